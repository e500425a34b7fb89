"""One module a migration; `HEAD` in `flash.plane.database` names the newest."""
