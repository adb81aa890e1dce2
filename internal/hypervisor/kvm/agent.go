package kvm

import "strings"

// agentArgs reads qemu-ga's command line: whether it names a freeze hook, and
// which file holds its further settings.
func agentArgs(args []string) (hook bool, config string) {
	config = "/etc/qemu/qemu-ga.conf"
	const takeValue = "mplfbstcar" // short options that have a value
	for i := 1; i < len(args); i++ {
		a := args[i]
		if long, ok := strings.CutPrefix(a, "--"); ok {
			name, value, has := strings.Cut(long, "=")
			switch name {
			case "fsfreeze-hook":
				return true, config
			case "config":
				if !has && i+1 < len(args) {
					value = args[i+1]
				}
				config = value
			}
			continue
		}
		for j := 1; strings.HasPrefix(a, "-") && j < len(a); j++ {
			if a[j] == 'F' {
				return true, config
			}
			if strings.IndexByte(takeValue, a[j]) >= 0 {
				value := a[j+1:]
				if value == "" && i+1 < len(args) {
					i++
					value = args[i]
				}
				if a[j] == 'c' {
					config = value
				}
				break
			}
		}
	}
	return false, config
}

// configHasHook looks for "fsfreeze-hook=PATH" in qemu-ga.conf.
func configHasHook(settings string) bool {
	for line := range strings.Lines(settings) {
		key, value, ok := strings.Cut(line, "=")
		if ok && strings.TrimSpace(key) == "fsfreeze-hook" && strings.TrimSpace(value) != "" {
			return true
		}
	}
	return false
}
