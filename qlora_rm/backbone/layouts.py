"""In which layouts of a batch a model gives each sequence the score that it gives it alone."""

from torch import nn

from qlora_rm.backbone.scoring import Layout

POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions")


def layouts_of(model: nn.Module) -> tuple[Layout, ...]:
    """Layouts whose scores must equal those of each sequence alone."""
    if any(isinstance(m, nn.Embedding) and name.endswith(POSITION_TABLES) for name, m in model.named_modules()):
        return ("right", "forest")
    return ("right", "left", "forest")
