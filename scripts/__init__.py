"""Before a script imports torch and matplotlib, what these cannot bear in the environment is replaced."""

from nanochat.environment import replace_unusable_variables

replace_unusable_variables()
