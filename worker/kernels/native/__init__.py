"""A generation step on a CPU as C that is compiled when a model is loaded.

`compiler` builds the C files, `step_kernels` offers them as functions of tensors once `trial` has compared them with
torch, `streamed_product` and `decoder_layer` are linear and decoder layers made of them. In C, `parts.h` lists what
there is to compute, `layer.c` puts a decoder layer together, `threads.c` shares it out, `step.h` has types and vectors.
"""
