"""The compiler's middle: programs, tracing, the modality-split form, the rewriter, the verifier, text and cost."""
