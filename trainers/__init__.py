"""The trainer: ranks that read one frozen config and run one loop."""

import logging

NOISE = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}
"""What libraries log as they are imported, of parts that nothing here uses: transformers imports torchao, and peft bitsandbytes."""


def _silence(logger: str, *noise: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: not any(text in record.getMessage() for text in noise))


for _logger, _texts in NOISE.items():
    _silence(_logger, *_texts)
