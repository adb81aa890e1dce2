package host

// State is what a VM is, for tests: "running", "off", "other", or "none" where
// there is no such VM.
func (h *Host) State(name string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.byName(name)
	switch {
	case v == nil:
		return "none"
	case v.state == stateRunning:
		return "running"
	case v.state == stateOff:
		return "off"
	}
	return "other"
}
