"""The kinds of cases of fuzz.py: each is a function that draws with `case.rng`, prepares a folder
and gives one command or several. To add one, write the function and name it in KINDS."""

from fuzz_damage import code, damage, disk, modes, own_modules, swap
from fuzz_foreign import foreign_before, foreign_inside
from fuzz_records import pictures, records
from fuzz_settings import command_line, environment, own_arms, scale_file, settings, settings_ini

KINDS = {  # name → (weight, function): most of the quick ones
    "settings": (34, settings),
    "own_arms": (14, own_arms),
    "scale_file": (6, scale_file),
    "settings_ini": (6, settings_ini),
    "command_line": (14, command_line),
    "environment": (8, environment),
    "records": (14, records),
    "pictures": (8, pictures),
    "damage": (18, damage),
    "code": (3, code),
    "swap": (5, swap),
    "own_modules": (0.3, own_modules),
    "modes": (3, modes),
    "disk": (4, disk),
    "foreign_before": (4, foreign_before),
    "foreign_inside": (6, foreign_inside),
}
