"""FX graphs as TensorRT networks: `network.build_segment` builds engines, `header.EngineHeader` reads what they were built for.

Works with TensorRT-RTX and with full TensorRT; `library` is the one place that imports either.
"""
