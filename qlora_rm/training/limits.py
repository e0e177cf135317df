"""Check of the run's longest sequence and token ids against the embeddings of the backbone."""

from dataclasses import dataclass

from torch import nn

from qlora_rm.backbone.limits import positions_of_config
from qlora_rm.backbone.load import read_model_config
from qlora_rm.backbone.positions import usable_positions
from qlora_rm.backbone.rotary import depends_on_length, longest_reach, rotary_length
from qlora_rm.console import say
from qlora_rm.errors import UserError
from qlora_rm.training.arguments import Options


@dataclass(frozen=True)
class Limits:
    """Limits that a backbone's configuration sets.

    Attributes:
        vocabulary: number of token ids with embeddings; None if the configuration does not give it.
        positions: longest sequence that a table of positions allows, in tokens; None without such a table.
        rotary_length: the length whose rotary scaling every sequence gets (`rotary.rotary_length`).
    """

    vocabulary: int | None
    positions: int | None
    rotary_length: int | None


def fit_max_length(options: Options) -> Limits:
    """Compare `--max_length` with the backbone's positions; lower a default that is too long, and report it.

    Raises:
        UserError: the user asked for more positions than there are.
    """
    args, backbone = options.training, options.backbone
    name = str(backbone.model_name_or_path)
    config = read_model_config(name, backbone.model_revision, args.trust_remote_code)
    text = config.get_text_config()
    positions, asked = positions_of_config(config, args.trust_remote_code), args.max_length
    if positions is not None and (asked is None or asked > positions):
        if asked is not None and options.max_length_given:
            raise UserError(_too_long(asked, name, positions))
        say(
            f"max_length: {positions}, since {name} has no more positions"
            + (f"; the default is {asked}" if asked else "")
        )
        args.max_length = positions
    made_for = longest_reach(config) if depends_on_length(config) else getattr(text, "max_position_embeddings", None)
    if positions is None and made_for and args.max_length and args.max_length > made_for:
        say(f"warning: --max_length {args.max_length} is more than the {made_for} positions that {name} was made for")
    length = rotary_length(config, args.max_length)
    if length is not None:
        say(
            f"rotary scaling: that of {length} tokens (--max_length) for every sequence; {name} would choose it by the batch"
        )
    return Limits(getattr(text, "vocab_size", None), positions, length)


def require_positions(model: nn.Module, options: Options) -> None:
    """Raise a `UserError` if the loaded model's tables have too few positions, which its configuration may not show."""
    positions, asked = usable_positions(model), options.training.max_length
    if positions is not None and (asked is None or asked > positions):
        raise UserError(_too_long(asked, str(options.backbone.model_name_or_path), positions))


def _too_long(asked: int | None, name: str, positions: int) -> str:
    length = "unlimited" if asked is None else asked
    return f"--max_length {length} is more than the {positions} positions of the backbone {name}. Pass --max_length {positions}."
