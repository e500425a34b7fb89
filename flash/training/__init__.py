"""
Torch-side building blocks that algorithm plugins share.

Names of tensors end in their shape, one letter a dimension:

    T  tokens of one document          N  tokens of a packed row
    D  documents of a row              K  trained positions of a row
    H  query heads                     G  key and value heads
    E  width of a head                 W  width of the hidden state
    V  vocabulary                      R  LoRA rank
    I  inputs of a linear layer        O  outputs of a linear layer
    B  batch, always 1 where a row is packed

Nothing outside this package, `flash/worker` and the plugins' work modules imports it.
"""
