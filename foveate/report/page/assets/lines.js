// Node lines before and after, in rows: equal lines face each other, and so do lines of one op that was changed.

const MOST_PAIRS = 1000000;

// A line without the numbers of value names, which move when a node comes or goes; and its op alone.
const unnumbered = (line) => line.replace(/\b([A-Za-z]\w*?)_\d+\b/g, "$1");
const opOf = (line) => line.slice(line.indexOf("=") + 1).split("(", 1)[0].trim();

// [[a or null, b or null], ...]
function facing(a, b) {
  const [stemsA, stemsB] = [a.map(unnumbered), b.map(unnumbered)];
  const [opsA, opsB] = [a.map(opOf), b.map(opOf)];
  const alike = (i, j) => (a[i] === b[j] ? 4 : stemsA[i] === stemsB[j] ? 3 : opsA[i] === opsB[j] ? 1 : 0);
  const rows = [];
  let [i, j] = [0, 0];
  for (const [nextI, nextJ] of [...pairs(a.length, b.length, alike), [a.length, b.length]]) {
    while (i < nextI) rows.push([a[i++], null]);
    while (j < nextJ) rows.push([null, b[j++]]);
    if (i < a.length && j < b.length) rows.push([a[i++], b[j++]]);
  }
  return rows;
}

// Places of two lists that go together, in order, so that their likeness is greatest in sum.
function pairs(lengthA, lengthB, alike) {
  if (lengthA * lengthB > MOST_PAIRS) return [];
  const width = lengthB + 1;
  const best = new Uint32Array((lengthA + 1) * width);
  const paired = (i, j) => {
    const likeness = alike(i, j);
    return likeness && likeness + best[(i + 1) * width + j + 1];
  };
  for (let i = lengthA - 1; i >= 0; i--) {
    for (let j = lengthB - 1; j >= 0; j--) {
      best[i * width + j] = Math.max(paired(i, j), best[(i + 1) * width + j], best[i * width + j + 1]);
    }
  }
  const places = [];
  let [i, j] = [0, 0];
  while (i < lengthA && j < lengthB) {
    const sum = best[i * width + j];
    if (sum && sum === paired(i, j)) places.push([i++, j++]);
    else if (sum === best[(i + 1) * width + j]) i++;
    else j++;
  }
  return places;
}

// The words of a line; those that the other line lacks are marked.
function marked(line, other) {
  if (other === null || line === other) return [line];
  const [words, others] = [line, other].map((text) => text.split(/(\W)/).filter((word) => word));
  const equal = (i, j) => Number(words[i] === others[j]);
  const kept = new Set(pairs(words.length, others.length, equal).map(([place]) => place));
  const parts = [];
  for (const [place, word] of words.entries()) {
    const differs = !kept.has(place);
    const last = parts[parts.length - 1];
    if (last && last.differs === differs) last.text += word;
    else parts.push({ differs, text: word });
  }
  return parts.map(({ differs, text }) => (differs ? make("mark", null, text) : text));
}
