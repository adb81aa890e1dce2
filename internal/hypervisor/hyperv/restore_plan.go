package hyperv

import (
	"slices"

	"github.com/backstay/backstay/internal/vm"
)

// What a VM of which nobody says more gets.
const (
	usualMemory     = 2 << 30 // bytes
	usualProcessors = 2
)

// How many of what a VM can have.
const (
	scsiControllers = 4
	scsiSlots       = 64
	ideControllers  = 2
	ideSlots        = 2
)

// A spot is where a disk hangs.
type spot struct {
	id         vm.DiskID
	bus        string // "ide" or "scsi"
	controller int
	slot       int
}

// arrangeNew finds each disk its spot: that which it had on Hyper-V, else the
// first one on IDE if the VM's firmware is a BIOS, which boots from nothing
// else, and all others on SCSI in their order. left are disks that find none.
func arrangeNew(def vm.Definition, disks []vm.DiskID, generation int) (spots []spot, left []vm.DiskID) {
	taken := map[spot]bool{}
	put := func(id vm.DiskID, bus string, controller, slot int) bool {
		at := spot{"", bus, controller, slot}
		inside := bus == "scsi" && controller < scsiControllers && slot < scsiSlots ||
			bus == "ide" && generation == 1 && controller < ideControllers && slot < ideSlots
		if !inside || controller < 0 || slot < 0 || taken[at] {
			return false
		}
		taken[at] = true
		at.id = id
		spots = append(spots, at)
		return true
	}
	var order []vm.DiskID
	for _, p := range def.Disks {
		if slices.Contains(disks, p.ID) && !slices.Contains(order, p.ID) {
			order = append(order, p.ID)
		}
	}
	for _, id := range disks {
		if !slices.Contains(order, id) {
			order = append(order, id)
		}
	}
	var later []vm.DiskID
	for _, id := range order {
		i := slices.IndexFunc(def.Disks, func(p vm.DiskPlace) bool { return p.ID == id })
		if def.Hypervisor != "hyperv" || i < 0 || !put(id, def.Disks[i].Bus, def.Disks[i].Controller, def.Disks[i].Slot) {
			later = append(later, id)
		}
	}
	for _, id := range later {
		found := len(spots) == 0 && put(id, "ide", 0, 0)
		for n := 0; !found && n < scsiControllers*scsiSlots; n++ {
			found = put(id, "scsi", n/scsiSlots, n%scsiSlots)
		}
		if !found {
			left = append(left, id)
		}
	}
	return spots, left
}

// plan decides what the VM will be like.
func (m *making) plan() error {
	def := m.o.Definition
	m.generation = 1
	if def.Firmware == "uefi" {
		m.generation = 2
	}
	if def.Firmware == "" {
		m.warn("the restore point does not say what firmware the VM had: it gets a BIOS (generation 1); --firmware uefi makes it generation 2")
	}
	m.processors, m.memory = def.Processors, def.MemoryBytes
	if m.processors <= 0 {
		m.processors = usualProcessors
	}
	if m.memory <= 0 {
		m.memory = usualMemory
	}
	if !m.o.Known {
		m.note("the restore point does not describe the VM: it gets %d processors, %d MiB of memory and no network card", m.processors, m.memory>>20)
	}
	m.memory = (m.memory + 2<<20 - 1) / (2 << 20) * (2 << 20) // the host takes whole pairs of MiB
	if m.generation == 2 {
		m.secureBoot = def.SecureBoot && def.Hypervisor == "hyperv"
		if !m.secureBoot && (def.SecureBoot || def.Hypervisor != "hyperv") {
			m.warn("Secure Boot is off: whether the guest's boot loader passes on this host is not known; switch it on once it does")
		}
	}
	if m.generation == 2 && def.Hypervisor == "kvm" {
		m.note(`its UEFI has no boot entries of the old one: it starts \EFI\BOOT\BOOTX64.EFI of the first disk that has it`)
	}
	for _, what := range def.Beyond {
		m.warn("the new VM lacks %s", what)
	}
	if def.TPM {
		m.warn("the VM had a virtual TPM, whose secrets stay with the old VM: a guest that keeps its key there (BitLocker) asks for its recovery key")
	}
	var left []vm.DiskID
	if m.spots, left = arrangeNew(def, m.o.Disks, m.generation); len(left) > 0 {
		return &NoSlotError{left}
	}
	for _, p := range def.Disks {
		if !slices.Contains(m.o.Disks, p.ID) {
			m.warn("disk %s is not in the restore point, and the new VM lacks it", p.ID)
		}
	}
	return nil
}
