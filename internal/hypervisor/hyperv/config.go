package hyperv

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/winpath"
)

// Bounds of what is taken for a file of a VM's definition.
const (
	maxConfigFile  = 64 << 20
	maxConfigFiles = 16
)

// describeConfig gathers the VM's definition: our own description, and the
// host's files. What can't be had is warned of, and ends no backup.
func (b *beginning) describeConfig(ctx context.Context) {
	def := b.definition(ctx)
	text, err := json.MarshalIndent(def, "", "  ")
	if err == nil {
		b.config = append(b.config, vm.ConfigFile{Name: "vm.json", Data: append(text, '\n')})
	}
	files, err := b.d.configFiles(ctx, b.frozen, b.now)
	b.config = append(b.config, files...)
	if err != nil {
		b.warn("the host's own definition of the VM is not in the restore point: %v", err)
	} else if def.TPM && !slices.ContainsFunc(b.config, func(f vm.ConfigFile) bool { return strings.EqualFold(filepath.Ext(f.Name), ".vmgs") }) {
		b.warn("the VM has a TPM, and the file of its state (.vmgs) is not where its definition is: without it the guest asks for its recovery keys after a restore")
	}
}

// definition is the VM without what only Hyper-V has.
func (b *beginning) definition(ctx context.Context) vm.Definition {
	s := b.frozen
	def := definitionOf(b.sys, s)
	def.Guest, def.Notes = b.ready.guest, strings.Join(s.list("Notes"), "\n")
	ask := func(class string) []object {
		list, err := b.d.query(ctx, associated(s.ref, classComponent, class))
		if err != nil {
			b.warn("the VM's description in the restore point lacks its %s: %v", class, err)
		}
		return list
	}
	for _, o := range ask("Msvm_ProcessorSettingData") {
		n, _ := o.number("VirtualQuantity")
		def.Processors = int(n)
	}
	for _, o := range ask("Msvm_MemorySettingData") {
		n, _ := o.number("VirtualQuantity") // in MiB
		def.MemoryBytes = n << 20
		if most, _ := o.number("Limit"); o.truth("DynamicMemoryEnabled") && most > n && most < 1<<30 {
			def.MemoryMaxBytes = most << 20
		}
	}
	ports := ask("Msvm_EthernetPortAllocationSettingData")
	nics := func(class, model string) {
		for _, o := range ask(class) {
			n := vm.NIC{Model: model, MAC: macText(o.text("Address"))}
			for _, p := range ports {
				if deviceOf(parseRef(p.text("Parent")).Key("InstanceID")) == deviceOf(o.text("InstanceID")) {
					n.Network = p.text("LastKnownSwitchName")
				}
			}
			def.NICs = append(def.NICs, n)
		}
	}
	nics("Msvm_SyntheticEthernetPortSettingData", "synthetic")
	if def.Firmware == "bios" { // generation 1 alone has these, generation 2 alone a TPM
		nics("Msvm_EmulatedEthernetPortSettingData", "emulated")
	} else {
		for _, o := range ask("Msvm_SecuritySettingData") {
			def.TPM = o.truth("TpmEnabled")
		}
	}
	for _, d := range b.machine.Disks {
		p := placeOf(d)
		for _, o := range b.disks {
			if n := o.img.Info().SectorBytes; o.info.ID == d.ID && n != 512 {
				p.SectorBytes = n
			}
		}
		def.Disks = append(def.Disks, p)
	}
	return def
}

// definitionOf is what a VM's settings say of it by themselves.
func definitionOf(sys system, s settings) vm.Definition {
	def := vm.Definition{Version: 1, Name: sys.name, UUID: sys.guid, Hypervisor: "hyperv", Firmware: "bios"}
	if strings.HasSuffix(s.text("VirtualSystemSubType"), ":2") {
		def.Firmware, def.SecureBoot, def.SecureBootTemplate = "uefi", s.truth("SecureBootEnabled"), s.text("SecureBootTemplateId")
	}
	return def
}

// placeOf is where a disk hangs.
func placeOf(d vm.Disk) vm.DiskPlace {
	p := vm.DiskPlace{ID: d.ID, SizeBytes: d.SizeBytes, Bus: d.Bus, Source: d.Source}
	fmt.Sscanf(strings.TrimPrefix(string(d.ID), d.Bus), "%d:%d", &p.Controller, &p.Slot)
	return p
}

// macText writes 00155D000102 with colons.
func macText(s string) string {
	if len(s) != 12 {
		return ""
	}
	return strings.Join([]string{s[:2], s[2:4], s[4:6], s[6:8], s[8:10], s[10:]}, ":")
}

// stemOf is a file's name without its extension, in which case does not count.
func stemOf(name string) string { return strings.ToLower(strings.TrimSuffix(name, filepath.Ext(name))) }

// configFiles takes the files of a definition as they are: of the first of a
// VM's states that has any. The last is what the VM is now.
func (d *Driver) configFiles(ctx context.Context, states ...settings) (out []vm.ConfigFile, err error) {
	for _, s := range states {
		root, file := s.text("ConfigurationDataRoot"), s.text("ConfigurationFile")
		if root == "" || file == "" {
			continue
		}
		top, err := winpath.Parse(root)
		if err != nil {
			return out, err
		}
		full, err := top.Join(file)
		if err != nil {
			return out, err
		}
		folder := full.Dir().String()
		stem := stemOf(full.Base())
		names, err := d.files.list(ctx, folder)
		if err != nil {
			return out, err
		}
		for _, name := range names {
			if stemOf(name) != stem || len(out) >= maxConfigFiles {
				continue
			}
			switch strings.ToLower(filepath.Ext(name)) {
			case ".vmcx", ".vmgs", ".vmrs":
			default:
				continue
			}
			data, err := readFile(ctx, d.files, folder+`\`+name, maxConfigFile)
			if err != nil {
				return out, err
			}
			out = append(out, vm.ConfigFile{Name: name, Data: data})
		}
		if len(out) > 0 {
			return out, nil
		}
	}
	if now := states[len(states)-1]; now.text("ConfigurationFile") != "" {
		return nil, fmt.Errorf("there is no %s in %s", now.text("ConfigurationFile"), now.text("ConfigurationDataRoot"))
	}
	return nil, nil
}
