"""`DMPOTrainer` and what it is made of. Importing it says at once whether the installed TRL can be extended."""

from .hooks import require_supported_trl


require_supported_trl()
