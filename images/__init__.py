"""From a file to an image: what there is, decoding, and what happens to one decoded image. Knows no batches."""
