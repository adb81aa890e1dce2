package kvm

import (
	"os"
	"strings"
)

// pciIsStorage says whether the host's device at address belongs to the class
// of mass storage. One that can't be asked is taken for none.
func pciIsStorage(address string) bool {
	class, err := os.ReadFile("/sys/bus/pci/devices/" + address + "/class")
	return err == nil && strings.HasPrefix(string(class), "0x01")
}
