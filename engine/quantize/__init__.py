"""Makes quantized checkpoints: `python -m engine.quantize MODEL OUT --method ...`. Serving needs none of it.

options     what was asked, and whether it can be done
source      the 16-bit checkpoint: its linear layers, tensors and digest
texts       a file of JSON lines as windows of tokens
work        the unfinished folder: shards, how far it is, what it belongs to
rounded     methods that look at weights alone: int8, int8-dynamic, int4, nf4, fp8
layouts     how their codes lie in files: compressed-tensors, bitsandbytes
gptq  awq   methods that look at text, decoder layer by decoder layer; the solvers are gptqmodel's and autoawq's
measure     what the result lost: perplexity, KL, errors per layer; read back as it is served
report      the same as a file and as a table
"""
