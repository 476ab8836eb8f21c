"""A small, complete MoE pre-training program on DeepSpeed ZeRO and expert parallelism.

It uses only the public interface of `moc`, and runs without it when `checkpoint.enabled` is false.
"""
