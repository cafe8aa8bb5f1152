"""Why an item is recommended: attributions to a user's history, a counterfactual, and a sentence that is checked."""

from .counterfactual import Counterfactual
from .explanation import Explanation, explain
from .grounding import Named, Sentence


__all__ = ["Counterfactual", "Explanation", "Named", "Sentence", "explain"]
