#!/usr/bin/env bash
# What action.yml runs: snapshots at base and head, their diff as Markdown and HTML, and gates. Run it in a git
# checkout with the variables that action.yml sets. Exit code: that of `foveate diff` (1: a gate failed, 2: wrong use).
set -euo pipefail
: "${FOVEATE_MODEL:?which model}" "${FOVEATE_PASSES?which passes}" "${FOVEATE_BASE:?which commit to compare with}"
output="${FOVEATE_OUTPUT:-foveate-diff}"
summary="${GITHUB_STEP_SUMMARY:-/dev/stdout}"
read -r -a options <<<"${FOVEATE_OPTIONS:-}"
read -r -a install <<<"${FOVEATE_INSTALL:-}"
gates=()
while IFS= read -r gate; do
    [ -z "${gate//[[:space:]]/}" ] || gates+=(--fail-if "$gate")
done <<<"${FOVEATE_GATES:-}"

mkdir -p "$output"
output="$(cd "$output" && pwd)"
head="$(git rev-parse --show-toplevel)"
work="$(mktemp -d)"
trap 'git -C "$head" worktree remove --force "$work/base" 2>/dev/null || true; rm -rf "$work"' EXIT

git -C "$head" cat-file -e "$FOVEATE_BASE^{commit}" 2>/dev/null ||
    git -C "$head" fetch --quiet --depth=1 origin "$FOVEATE_BASE"
git -C "$head" worktree add --quiet --detach "$work/base" "$FOVEATE_BASE"

snapshot() { # checkout, name
    cd "$1"
    if [ "${#install[@]}" -gt 0 ]; then
        python -m venv "$work/$2-venv"
        "$work/$2-venv/bin/pip" install --quiet "${install[@]}"
        PATH="$work/$2-venv/bin:$PATH"
    fi
    foveate snapshot "$FOVEATE_MODEL" --passes "$FOVEATE_PASSES" "${options[@]}" -o "$output/$2.json"
}

if [[ "$FOVEATE_PASSES" == *.y*ml && ! -e "$work/base/$FOVEATE_PASSES" ]]; then
    (snapshot "$head" head)
    echo "\`$FOVEATE_PASSES\` is new: there is nothing at the base to compare it with, and no gate was checked." >>"$summary"
    exit 0
fi
(snapshot "$work/base" base)
(snapshot "$head" head)
if [ "${#install[@]}" -gt 0 ]; then
    PATH="$work/head-venv/bin:$PATH"
fi
cd "$output"
foveate diff base.json head.json --format html -o diff.html
code=0
foveate diff base.json head.json --format markdown -o diff.md "${gates[@]}" || code=$?
[ ! -e diff.md ] || cat diff.md >>"$summary"
if [ -n "${GITHUB_OUTPUT:-}" ]; then
    printf 'markdown=%s\nhtml=%s\n' "$output/diff.md" "$output/diff.html" >>"$GITHUB_OUTPUT"
fi
exit "$code"
