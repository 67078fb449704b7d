"""What the launching side can know about the data before anything is sent."""

from __future__ import annotations

from itertools import islice

from launcher.data.formats import Conversation, load_chat_template, make_examples
from launcher.data.rows import HUB_SCHEME, check_hub_name
from launcher.errors import DataError, ModelError
from launcher.recipe import Data

CHECKED_ROWS = 200


def check_data(data: Data, base_dir: str, *, has_chat_template: bool | None) -> None:
    """Check that every source is there and that its first 200 rows parse. The training side reads the rest.

    `has_chat_template` says whether the tokenizer has one of its own; None where that is not known here.
    A hub:// source is checked by name only: fetching it is the training side's work.
    Raises DataError for a file, a row or an empty split, ModelError where conversations have no template.
    """
    template = load_chat_template(data, base_dir)
    for source in (*data.train, *data.eval):
        if source.path.startswith(HUB_SCHEME):
            check_hub_name(source)
            continue
        examples = list(islice(make_examples(source, base_dir, data), CHECKED_ROWS))
        if template is None and has_chat_template is False:
            for example in examples:
                if isinstance(example, Conversation) and example.joiner is None:
                    raise make_template_error(example.where)
        if data.eval_fraction and len(data.train) == 1 and len(examples) == 1:
            raise DataError(f"{source.path} has 1 row, which data.eval_fraction cannot split", "add rows, or name data.eval")


def make_template_error(where: str) -> ModelError:
    """Conversations without a chat template: which key sets one."""
    return ModelError(
        f"{where} is a conversation, and the tokenizer has no chat template to write it with",
        "set data.chat_template (the text, or a file), or use a model that has one, such as its -Instruct version",
    )
