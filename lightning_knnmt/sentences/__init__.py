"""Which stored sentences are like this one: by their words, by the model's own encoder, or by another encoder."""
