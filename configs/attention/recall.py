"""A decoder that recalls: random passages between real text come a second time and must be continued.

python -m experiments.train_recall --config=configs/attention/recall.py --workdir=runs/recall --export=runs/recall/model

Expected: at 2048 tokens every symbol of a passage is right the second time (held-out text, any depth). 15 CPU-minutes.
"""

from ml_collections import ConfigDict

STAGES = ((64, 64, 1, 200), (256, 16, 4, 200), (1024, 4, 8, 300), (2048, 2, 12, 600))


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(
        dict(
            seed=0,
            # Fields of jaxcomp.models.LlamaConfig; norms on queries and keys let heads sharpen within few steps.
            model=dict(
                family="qwen3",
                vocab_size=128,
                hidden_size=64,
                intermediate_size=128,
                num_layers=2,
                num_heads=2,
                head_dim=32,
                max_len=8192,
                tie_embeddings=True,
            ),
            rope_theta=1e5,  # slow dimensions hardly turn over 2048 tokens: what is sought is found at any distance
            query_chunk=512,  # rows of attention scores held at once
            symbols=(0, 128),  # of passages: those of text, in any order
            span=24,  # symbols of a passage
            prompt=2,  # of them before the first that must be right
            stages=STAGES,  # tokens, sequences of a batch, passages of a sequence, steps
            steps=sum(stage[-1] for stage in STAGES),
            learning_rate=4e-3,
            final_learning_rate=1e-4,
            warmup_steps=50,
            weight_decay=0.01,
            beta2=0.98,
            clip_norm=1.0,
            log_every=10,
            checkpoint_every=50,
        )
    )
