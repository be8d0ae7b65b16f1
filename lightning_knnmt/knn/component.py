"""Parts that a configuration chooses by `class_path`: retrievers, combiners and gates."""

import inspect
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel
    from lightning_knnmt.knn.memory import Memory


class Component:
    """A part of a mixture. It keeps each option of its constructor as an attribute of the same name."""

    @property
    def options(self) -> dict[str, Any]:
        """The options of the constructor and their values.

        Raises:
            TypeError: One is not kept under its name, or a parameter of the network stands there.
        """
        for name in self.option_names:
            if not hasattr(self, name) or isinstance(getattr(self, name), nn.Parameter):
                raise TypeError(
                    f"{type(self).__name__} has an option {name}, expected its value as given in an attribute of that "
                    "name; give a parameter of the network another"
                )
        return {name: getattr(self, name) for name in self.option_names}

    @cached_property
    def option_names(self) -> tuple[str, ...]:
        """The options of the constructor."""
        various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # of nn.Module's own constructor
        parameters = inspect.signature(type(self)).parameters.items()
        return tuple(name for name, parameter in parameters if parameter.kind not in various)

    @property
    def configuration(self) -> dict[str, Any]:
        """Class and options as a configuration file has them; paths are text there."""
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        options = {name: str(value) if isinstance(value, Path) else value for name, value in self.options.items()}
        return {"class_path": path, "init_args": options}

    def with_options(self, **changed: Any) -> Self:
        """A new part of the same class with some options changed, not bound to any model.

        Without changes, trained parameters of a network are copied; with others, they are those that the options make.

        Raises:
            ValueError: There is no such option.
        """
        if unknown := sorted(set(changed) - set(self.option_names)):
            raise ValueError(f"{type(self).__name__} has no option {', '.join(unknown)}, expected {self.option_names}")
        made = type(self)(**{**self.options, **changed})
        if not changed and isinstance(made, nn.Module) and isinstance(self, nn.Module):
            made.load_state_dict(self.state_dict())
        return made

    def bind(self, model: "KeyedModel", memory: "Memory") -> None:
        """Learn which model and which memory it works with; called once, before anything else.

        Raises:
            ValueError: It does not fit them.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"
