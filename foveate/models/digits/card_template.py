"""The text of the model card; `$name` marks what a training run fills in."""

CARD = r"""---
library_name: transformers
pipeline_tag: image-text-to-text
---

# digits: a small LLaVA that reads grids of handwritten digits

A complete `LlavaForConditionalGeneration` in miniature: CLIP tower, MLP projector, Llama decoder,
`LlavaProcessor`. It exists so that work on visual tokens can be tried, timed and *scored* on a laptop
with no download. It is real in the sense that counts: it was trained on real handwriting, it is asked
in words, and it loses accuracy when the wrong visual tokens are taken away.

## Example

![a held-out grid](example.png)

What its cells read (`-` is a cell without a digit, blank or cluttered):

```
$grid
```

## Tasks and prompt grammar

One question a prompt: `USER: <image>\n{question} ASSISTANT:`. Answers end in `</s>`.

| task | question | answer |
|---|---|---|
| lookup | `which digit is at row 2 , column 3 ?` | one digit, or `empty` |
| count | `how many 7 are there ?` | a number, `0` to `16` |
| row | `read row 3 .` | four words, each a digit or `empty` |

Rows and columns count from 1. Any cell that holds no digit reads `empty`, blank or cluttered. The
vocabulary holds these words and no others; case and spacing do not matter.

## Accuracy

On digits that no training image contains, fresh random grids, greedy decoding, one question a prompt,
an answer right only if every word of it is; measured on the stored weights (float16, upcast to float32):

| task | accuracy | samples |
|---|---|---|
$accuracy

In the count samples three questions in four ask about a digit that is there, so most answers are 1 to 4.

## Data

Single digits: *Optical Recognition of Handwritten Digits*, E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, 1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0; the 1,797 8x8 images
that scikit-learn ships as `load_digits`. They are stored here unchanged, with a split by sample that
is stratified by digit: $train to train on, $heldout held out (40 of each digit). The writers are not
named in the data, so a writer may be on both sides of the split.

Images: 96 x 96 pixels, a 4 x 4 grid of 24-pixel cells. 0 to $most_non_digits cells hold no digit: they
are blank, or hold noise, dots, strokes or bars. Digits vary in size, place, slant and contrast; training
images vary more, and blend two images of the same digit at times.

## Architecture

| part | shape |
|---|---|
| image | 96 x 96, patches of 8: 144 visual tokens |
| vision tower | CLIP, 5 layers x 128, 4 heads, MLP 512; feature layer -2 without the class token |
| projector | two linear layers with GELU, 128 to 192 |
| decoder | Llama, 10 layers x 192, 8 heads, MLP 512, untied output matrix |
| size | $parameters parameters, $size bytes as float16 |

As in LLaVA 1.5, the last tower layer is computed and not used.

## Training

One run of `python -m foveate.models.digits.train --output DIR` with its defaults (seed $seed), $minutes
minutes of wall clock on $machine that may have had other work to do, $precision:

1. Tower and projector alone, $tower_steps steps of $batch images at $tower_rate: what each cell and each
   patch shows (read through the decoder's output matrix), its row and its column.
2. The whole model, $steps steps of $batch images at $rate: one image and then many questions in one causal
   sequence, loss on answers only. The first $row_steps steps read rows; then all tasks are mixed, few counts
   at first; the last $single_steps steps ask one question a sequence, with twice the images. A half, later a
   quarter, of the long sequences ask in reading order.

Beside the answers stands a place loss, weighted $place_weight: after $place_layer decoder layers, a head that
is thrown away later must tell from the token about to answer which cell is meant, and from each visual token
where it lies; and the keys of the layers above start equal to their queries. Trials with answers alone were
several times slower to find look-up. So the middle layers are tidier here than in a model that was trained on
answers alone.

AdamW, a plateau and then a linear fall of the rate. The same machine with the same number of threads
repeats the run; another machine gets similar weights, not the same.

## Limits

- It knows this grammar and this kind of image, nothing else. Other words become `<unk>`, and the answer to
  a question outside the grammar means nothing.
- It does not count. It says 0 or 1 nearly always and is right about as often as "1" every time would be. Use
  look-up and rows to score a method.
- Look-up and rows fail mostly where a digit is hard to tell at 8 x 8 pixels.
- Each cell covers nine visual tokens that all carry its digit, so visual tokens have more slack here than in
  photographs; results about pruning show a mechanism, not what a large model would lose.
"""
