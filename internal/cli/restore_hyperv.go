package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/hyperv"
	"github.com/backstay/backstay/internal/hypervisor/kvm"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/restore"
	"github.com/backstay/backstay/internal/vm"
)

// checkHyperV refuses what does not go with a VM on a Hyper-V host.
func (o restoreOptions) checkHyperV(dst source) error {
	switch {
	case o.bus != "":
		return usage("--bus goes with --to kvm:///system/NEWNAME")
	case dst.vm == "":
		return usage("--to %s names no VM: want hyperv://USER@HOST/NEWNAME", o.to)
	case o.force:
		return usage("--force does not go with a VM: a new one never replaces one, and --in-place gives one that is there its disks back")
	case o.format != "" && o.format != string(image.VHDX):
		return usage("--format %s: disks of a VM on Hyper-V are VHDX", o.format)
	case !o.inPlace && o.disk != "":
		return usage("--disk goes with --in-place: a new VM gets all its disks")
	case !o.inPlace && (o.powerOff || o.removeOld):
		return usage("--power-off and --remove-old go with --in-place")
	case o.inPlace && (o.folder != "" || o.connectNICs || o.keepMACs || o.firmware != ""):
		return usage("--folder, --connect-nics, --keep-macs and --firmware are of a new VM; --in-place keeps the one that is there, and changes its disks alone")
	case o.firmware != "" && o.firmware != "bios" && o.firmware != "uefi":
		return usage("--firmware %q: want bios or uefi", o.firmware)
	}
	if err := open.CheckCreate(image.VHDX, image.CreateOptions{Variant: o.variant, Compression: o.compression}); err != nil {
		return usageError{err}
	}
	return nil
}

// hypervOnly are flags that say nothing of other targets.
func (o restoreOptions) hypervOnly() error {
	if o.folder != "" || o.connectNICs || o.keepMACs || o.firmware != "" || o.powerOff || o.removeOld {
		return usage("--folder, --connect-nics, --keep-macs, --firmware, --power-off and --remove-old go with --to hyperv://USER@HOST/NAME")
	}
	return nil
}

// definitionOf is what a restore point says of its VM, from its own description
// or its hypervisor's; known is false where only its disks are known.
func definitionOf(ctx context.Context, from restore.Repository, p *point.RestorePoint) (def vm.Definition, known bool, err error) {
	read := func(name string) ([]byte, error) {
		b, has := p.Config[name]
		if !has {
			return nil, nil
		}
		data, err := from.ReadBlob(ctx, b)
		if err != nil {
			return nil, fmt.Errorf("restore %s: file %s: %w", p.Ref(), name, err)
		}
		return data, nil
	}
	data, err := read("vm.json")
	if err != nil {
		return def, false, err
	}
	if data != nil {
		if err := json.Unmarshal(data, &def); err != nil {
			return def, false, fmt.Errorf("restore %s: file vm.json: %w", p.Ref(), err)
		}
		return def, true, nil
	}
	if data, err = read("domain.xml"); err != nil {
		return def, false, err
	}
	if data != nil {
		def, err = kvm.Describe(data)
		return def, err == nil, err
	}
	def = vm.Definition{Version: 1, Name: p.Machine.Name, Hypervisor: p.Machine.Hypervisor}
	for i, d := range p.Disks {
		def.Disks = append(def.Disks, vm.DiskPlace{ID: d.ID, Bus: d.Bus, Slot: i})
	}
	return def, false, nil
}

// restoreHyperV makes a VM on a Hyper-V host, or gives one its disks back.
func (a *app) restoreHyperV(ctx context.Context, from restore.Repository, repoID string, p *point.RestorePoint, dst source, o restoreOptions, opts restore.Options, bar *bar) error {
	d, err := a.openHyperV(ctx, dst, driverOptions{host: o.host})
	if err != nil {
		return err
	}
	defer d.Close()
	how := restore.BuildOptions{Options: opts, Prove: o.inPlace}
	def, _, err := definitionOf(ctx, from, p)
	if err != nil && !o.inPlace {
		return err
	}
	if err != nil {
		a.say("warning: the disks get sectors of 512 bytes, as what they had can't be read: %v", err)
	}
	how.Sectors = sectorsOf(def)
	var b hypervisor.Builder
	if o.inPlace {
		b, how.Disks, err = a.replaceHyperV(ctx, d, repoID, p, dst, o)
	} else {
		b, err = a.newHyperV(ctx, d, from, repoID, p, dst, o)
	}
	if err != nil {
		return restoreVMHint(err)
	}
	res, err := restore.Build(ctx, from, p, b, how)
	bar.end()
	if err != nil {
		return restoreVMHint(err)
	}
	at := *dst.host
	at.Path, at.RawQuery = "/"+res.VM.Name, ""
	res.Target = at.Redacted()
	if err := a.reportRestore(res); err != nil {
		return err
	}
	return a.warned(res.VM.Warnings)
}

func (a *app) newHyperV(ctx context.Context, d *hyperv.Driver, from restore.Repository, repoID string, p *point.RestorePoint, dst source, o restoreOptions) (hypervisor.Builder, error) {
	def, known, err := definitionOf(ctx, from, p)
	if err != nil {
		return nil, err
	}
	if o.firmware != "" {
		def.Firmware = o.firmware
	}
	n := hyperv.NewVMOptions{Name: dst.vm, RepoID: repoID, Definition: def, Known: known, Folder: o.folder, ConnectNICs: o.connectNICs, KeepMACs: o.keepMACs, Start: o.start}
	for _, disk := range p.Disks {
		n.Disks = append(n.Disks, disk.ID)
	}
	if def.Hypervisor == "hyperv" && known && o.firmware == "" {
		if n.Files, err = ownDefinition(ctx, from, p); err != nil {
			return nil, err
		}
	}
	b, err := d.NewVM(ctx, n)
	if err != nil {
		return nil, err // no Building in an interface
	}
	return b, nil
}

// ownDefinition are the files of Hyper-V's own definition of the VM.
func ownDefinition(ctx context.Context, from restore.Repository, p *point.RestorePoint) (map[string][]byte, error) {
	files := map[string][]byte{}
	for name, b := range p.Config {
		switch strings.ToLower(filepath.Ext(name)) {
		case ".vmcx", ".vmgs", ".vmrs":
		default:
			continue
		}
		data, err := from.ReadBlob(ctx, b)
		if err != nil {
			return nil, fmt.Errorf("restore %s: file %s: %w", p.Ref(), name, err)
		}
		files[name] = data
	}
	return files, nil
}

func (a *app) replaceHyperV(ctx context.Context, d *hyperv.Driver, repoID string, p *point.RestorePoint, dst source, o restoreOptions) (hypervisor.Builder, []vm.DiskID, error) {
	r := hyperv.ReplaceOptions{VM: dst.vm, RepoID: repoID, PowerOff: o.powerOff, Start: o.start, RemoveOld: o.removeOld}
	if p.Machine.Hypervisor == "hyperv" {
		r.Of = p.Machine.UUID
	}
	for _, disk := range p.Disks {
		r.Disks = append(r.Disks, disk.ID)
	}
	if o.disk != "" {
		disk, err := selectDisk(p, o.disk)
		if err != nil {
			return nil, nil, err
		}
		r.Disks = []vm.DiskID{disk.ID}
	}
	b, err := d.Replace(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	return b, r.Disks, nil
}

// warned prints warnings, with which a command ends with a code of its own.
func (a *app) warned(warnings []string) error {
	for _, w := range warnings {
		a.say("warning: %s", w)
	}
	if len(warnings) == 0 {
		return nil
	}
	return coded{code: exitWarnings, err: errPartial}
}

// restoreVMHint says what to do about a restore to a host that failed because
// of the host.
func restoreVMHint(err error) error {
	switch {
	case errors.Is(err, hyperv.ErrRunning):
		return withHint(err, "shut it down first, or say --power-off: then it is switched off when its restored disks are ready, as if its plug were pulled")
	case errors.Is(err, hyperv.ErrCheckpoints):
		return withHint(err, "delete them in Hyper-V first, which merges them into its disks; one of an interrupted backup goes with the next backup. Or restore to a new VM, without --in-place")
	case errors.As(err, new(*hyperv.FolderError)):
		return withHint(err, `name a folder that is there, for example --folder 'D:\VMs'; with ?share= in the URL one of those shares must reach it`)
	case errors.Is(err, fault.ErrExists):
		return withHint(err, "choose another name: a restore never replaces a VM. --in-place gives one that is there its disks back")
	case errors.Is(err, fault.ErrNoSpace):
		return withHint(err, `free space on that volume of the host; a new VM may lie on another: --folder 'D:\VMs'`)
	}
	return err
}
