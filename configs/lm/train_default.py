"""The small decoder that ships with the package (jaxcomp/data/assets/lm).

python -m experiments.train_lm --config=configs/lm/train_default.py --workdir=runs/lm --export=jaxcomp/data/assets/lm

Text: the standard library's documentation and comments (jaxcomp.data.stdlib). Expected: validation perplexity 23.0
(95 % interval 22.2 to 24.0) after 26 minutes on two busy CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(
        dict(
            seed=0,
            vocab_size=1024,
            # Fields of jaxcomp.models.llama_config.LlamaConfig; the vocabulary is the tokenizer's.
            model=dict(
                hidden_size=128,
                intermediate_size=384,
                num_layers=6,
                num_heads=4,
                num_kv_heads=2,
                head_dim=32,
                max_len=256,
                tie_embeddings=True,
            ),
            context=256,
            batch_size=8,
            steps=3000,
            learning_rate=4e-3,
            final_learning_rate=4e-5,
            warmup_steps=100,
            weight_decay=0.1,
            beta2=0.98,
            clip_norm=1.0,
            log_every=50,
            eval_every=500,
            checkpoint_every=250,
        )
    )
