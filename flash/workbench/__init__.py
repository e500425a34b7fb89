"""Starting an environment, and finding out early whether its reward can teach anything."""
