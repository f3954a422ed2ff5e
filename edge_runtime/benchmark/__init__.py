"""``emberlora edge bench``: what training costs on this device, each setting measured in a process of its own."""
