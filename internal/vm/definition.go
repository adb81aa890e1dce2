package vm

// A Definition is a VM without what only one hypervisor has, kept in restore
// points as vm.json. It is enough to make a VM of the same shape on any of
// them: fields may be added, never given another meaning. What is not known is
// left out.
type Definition struct {
	Version     int    `json:"v"` // 1
	Name        string `json:"name"`
	UUID        string `json:"uuid,omitempty"`
	Hypervisor  string `json:"hypervisor"` // where it comes from
	Processors  int    `json:"processors,omitempty"`
	MemoryBytes int64  `json:"memory_bytes,omitempty"` // when it starts
	// MemoryMaxBytes is how far it may grow while it runs, if it may.
	MemoryMaxBytes int64  `json:"memory_max_bytes,omitempty"`
	Guest          string `json:"guest,omitempty"`    // GuestLinux or GuestWindows, by its own word
	Firmware       string `json:"firmware,omitempty"` // "bios" or "uefi"
	SecureBoot     bool   `json:"secure_boot,omitempty"`
	// SecureBootTemplate is whose signatures Hyper-V takes, by its GUID.
	SecureBootTemplate string `json:"secure_boot_template,omitempty"`

	TPM bool `json:"tpm,omitempty"`
	// Beyond names, in words, what the VM has and this can't describe.
	Beyond []string    `json:"beyond,omitempty"`
	Notes  string      `json:"notes,omitempty"`
	Disks  []DiskPlace `json:"disks"`
	NICs   []NIC       `json:"nics,omitempty"`
}

// What may run in a VM, as far as devices are chosen by it.
const (
	GuestLinux   = "linux"
	GuestWindows = "windows"
)

// A DiskPlace is a disk and where it hangs; all of the VM's, also those that
// are not in the restore point.
type DiskPlace struct {
	ID        DiskID `json:"id"`
	SizeBytes int64  `json:"size_bytes,omitempty"`
	// SectorBytes is what the guest sees as a sector, if that is not 512 bytes:
	// its partition table counts in them.
	SectorBytes int `json:"sector_bytes,omitempty"`

	Bus        string `json:"bus,omitempty"` // "scsi", "ide", …
	Controller int    `json:"controller"`    // of the bus, from 0
	Slot       int    `json:"slot"`          // of the controller, from 0
	Source     string `json:"source,omitempty"`
}

// A NIC is a network card.
type NIC struct {
	MAC     string `json:"mac,omitempty"`     // 12 hexadecimal digits in pairs with colons; empty for one that the hypervisor chooses
	Network string `json:"network,omitempty"` // the switch or network that it is connected to, as the hypervisor calls it; empty for none
	Model   string `json:"model,omitempty"`   // "synthetic", "emulated", …
}
