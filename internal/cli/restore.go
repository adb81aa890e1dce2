package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/kvm"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/restore"
	"github.com/backstay/backstay/internal/vm"
)

type restoreOptions struct {
	to          string
	disk        string
	format      string
	variant     string
	compression string
	force       bool
	inPlace     bool
	start       bool
	bus         string // of a VM of libvirt's

	// Of a VM on a Hyper-V host.
	folder      string
	connectNICs bool
	keepMACs    bool
	firmware    string
	powerOff    bool
	removeOld   bool
	host        credentials
}

func (a *app) restoreCmd() *cobra.Command {
	o := restoreOptions{host: hostCredentials()}
	cmd := &cobra.Command{
		Use:   "restore POINT",
		Short: "bring a restore point back as images or as a VM",
		Long: `Bring a restore point back. POINT is VM/ID, or VM for its newest point.

--to FILE makes one image; its format is the file's extension or --format.
--to DIR/ makes all disks in a directory, with the VM's definition beside them;
with --disk it makes that one there, and leaves alone what else is there.
--to kvm:///system/NAME makes a new VM of them, which never replaces one. One
that comes from another hypervisor gets its disks on the bus that its guest is
likeliest to boot from; --bus chooses another.
--to hyperv://USER@HOST/NAME does so on a Hyper-V host, wherever the restore
point comes from: in a folder of its own, written over SMB as VHDX, with new
identifiers and its network cards connected to nothing. The URL is that of
"backstay backup". With --in-place the VM NAME gets its disks back instead: they
are written beside its own while it may run, read back and compared, and swapped
last, when it is off. The old disks stay beside under another name.

The target appears when it is whole and durable, and never replaces anything
without --force. Every chunk is verified while it is written. --in-place for an
image file writes only the chunks that differ; that is not atomic, and if it is
interrupted the same command completes it.`,
		Example: `  backstay restore web01 --to web01.vhdx --repo /srv/backup
  backstay restore web01/20261122T031500Z-7f3a9c01 --to /restored/
  backstay restore hv-web01 --to kvm:///system/web01 --bus virtio --start
  backstay restore web01 --disk vdb --to data.raw
  backstay restore web01 --to kvm:///system/web01-again --start
  backstay restore web01 --to disk.qcow2 --in-place
  backstay restore web01 --to 'hyperv://backup@hv01/web01-again?fingerprint=sha256:5F…' --start
  backstay restore web01 --to 'hyperv://backup@hv01/web01' --in-place --power-off --start`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.restore(cmd.Context(), o, args[0]) },
	}
	f := cmd.Flags()
	a.asOfFlag(f)
	f.StringVar(&o.to, "to", "", "image file, directory, kvm:///system/NEWNAME or hyperv://USER@HOST/NEWNAME (required)")
	f.StringVar(&o.disk, "disk", "", "only this disk: its name (vda) or its number, counted from 0")
	f.StringVar(&o.format, "format", "", oneOf(formatWords())+" (default: by the extension, or what the disk was)")
	f.StringVar(&o.variant, "variant", "", "of the format: "+variantHelp())
	f.StringVar(&o.compression, "image-compression", "", "zlib or zstd, for a compressed qcow2")
	f.BoolVar(&o.force, "force", false, "replace an existing target, once the restored one is whole")
	f.BoolVar(&o.inPlace, "in-place", false, "write only the chunks that differ into an existing image; give an existing VM on Hyper-V its disks back")
	f.BoolVar(&o.start, "start", false, "start the VM")
	f.StringVar(&o.bus, "bus", "", "on KVM: "+oneOf(kvm.Buses)+", for disks of a VM of another hypervisor (default: what such a guest is likeliest to boot from)")
	f.StringVar(&o.folder, "folder", "", `on the Hyper-V host: where the new VM's own folder is made (default: where the host keeps VMs)`)
	f.BoolVar(&o.connectNICs, "connect-nics", false, "on Hyper-V: connect the new VM's network cards to the switches that they were connected to")
	f.BoolVar(&o.keepMACs, "keep-macs", false, "on Hyper-V: network cards keep their addresses, for good, which the original may be using")
	f.StringVar(&o.firmware, "firmware", "", "on Hyper-V: bios or uefi (generation 1 or 2) (default: what the VM had)")
	f.BoolVar(&o.powerOff, "power-off", false, "with --in-place on Hyper-V: switch the VM off when its restored disks are ready")
	f.BoolVar(&o.removeOld, "remove-old", false, "with --in-place on Hyper-V: remove the old disks once the VM has the restored ones")
	addHostFlags(f, &o.host)
	completeWords(cmd, "bus", kvm.Buses)
	completeWords(cmd, "firmware", []string{"bios", "uefi"})
	completeWords(cmd, "format", formatWords())
	var variants, compressions []string
	for _, f := range open.Formats() {
		variants = append(variants, open.Variants(f)...)
		compressions = append(compressions, open.Compressions(f)...)
	}
	completeWords(cmd, "variant", variants)
	completeWords(cmd, "image-compression", compressions)
	return cmd
}

// check refuses what no image of format f can be, before anything is read. An
// unknown f is still to be settled: then all flags must fit some format.
func (o restoreOptions) check(f image.Format) error {
	asked := image.CreateOptions{Variant: o.variant, Compression: o.compression}
	if o.inPlace && asked != (image.CreateOptions{}) {
		return usage("--variant and --image-compression are of a new image; --in-place keeps the one that is there")
	}
	if f != "" {
		if err := open.CheckCreate(f, asked); err != nil {
			return usageError{err}
		}
		return nil
	}
	if asked == (image.CreateOptions{}) {
		return nil
	}
	var err error
	for _, f := range open.Formats() {
		if err = open.CheckCreate(f, asked); err == nil {
			return nil
		}
	}
	return usage("--variant %q and --image-compression %q fit no format: variants are %s; compressions are %s of qcow2",
		o.variant, o.compression, variantHelp(), strings.Join(open.Compressions(image.Qcow2), ", "))
}

func (a *app) restore(ctx context.Context, o restoreOptions, ref string) error {
	if o.to == "" {
		return usage("where to? say --to")
	}
	var opts restore.Options
	if o.format != "" {
		if !slices.Contains(formatWords(), o.format) {
			return usage("format %q cannot be written: want %s", o.format, oneOf(formatWords()))
		}
		opts.Format = image.Format(o.format)
	}
	opts.Variant, opts.Compression, opts.Force = o.variant, o.compression, o.force
	dst, err := parseSource(o.to)
	if err != nil {
		return err
	}
	target := opts.Format
	if dst.kind() == "hyperv" {
		if err := o.checkHyperV(dst); err != nil {
			return err
		}
	} else if err := o.hypervOnly(); err != nil {
		return err
	}
	if target == "" && dst.scheme == "" && !isDirectory(o.to) {
		target = restore.FormatOf(o.to)
	}
	if dst.kind() != "hyperv" {
		if err := o.check(target); err != nil {
			return err
		}
	}
	switch {
	case dst.kind() == "hyperv":
	case o.bus != "" && dst.kind() != "kvm":
		return usage("--bus goes with --to kvm:///system/NEWNAME")
	case o.bus != "" && !slices.Contains(kvm.Buses, o.bus):
		return usage("--bus %q: want %s", o.bus, oneOf(kvm.Buses))
	case dst.scheme != "" && dst.vm == "":
		return usage("--to %s names no VM: want kvm:///system/NEWNAME", o.to)
	case dst.scheme != "" && (o.disk != "" || o.inPlace || o.force):
		return usage("--disk, --in-place and --force do not go with a new VM")
	case dst.scheme == "" && o.start:
		return usage("--start goes with a VM: --to kvm:///system/NEWNAME or hyperv://USER@HOST/NEWNAME")
	case o.inPlace && o.force:
		return usage("--in-place overwrites by itself; --force does not go with it")
	}
	r, p, err := a.findPoint(ctx, ref)
	if err != nil {
		return err
	}
	defer r.Close()
	if p.Suspect != "" {
		a.say("warning: %s is suspect: %s", p.Ref(), p.Suspect)
	}
	// A store that takes no writes can be restored from as well: then nobody
	// should delete the point meanwhile.
	if release, err := r.Hold(ctx, p); err == nil {
		defer release()
	} else if errors.Is(err, fault.ErrNotFound) {
		return err
	}
	bar := a.newBar("restoring")
	defer bar.end()
	opts.Progress = bar.set
	from := restore.Of(r)
	if dst.kind() == "hyperv" {
		return a.restoreHyperV(ctx, from, r.ID(), p, dst, o, opts, bar)
	}
	if dst.scheme != "" {
		return a.restoreVM(ctx, from, p, dst, restore.VMOptions{Options: opts, Name: dst.vm, Start: o.start}, o.bus, bar)
	}
	def, _, unknown := definitionOf(ctx, from, p)
	opts.Sectors = sectorsOf(def)
	if unknown != nil {
		unknown = fmt.Errorf("whether a disk had sectors of more than 512 bytes can't be read: %w", unknown)
	}
	if o.disk == "" && len(p.Disks) != 1 && opts.Format == "" && restore.FormatOf(o.to) != "" {
		return usage("%s has %s: choose one with --disk, or give a directory as --to DIR/", p.Ref(), plural(int64(len(p.Disks)), "disk"))
	}
	if isDirectory(o.to) && o.inPlace {
		return usage("--to %s is a directory: with --in-place name an image file", o.to)
	}
	if isDirectory(o.to) && o.disk != "" {
		return a.restoreInto(ctx, from, p, o, opts, unknown, bar)
	}
	if isDirectory(o.to) || o.disk == "" && len(p.Disks) != 1 && !o.inPlace {
		res, err := restore.Directory(ctx, from, p, filepath.Clean(o.to), opts)
		bar.end()
		if err != nil {
			return restoreHint(err, o.to)
		}
		return a.reportDisks(res, opts.Sectors, unknown)
	}
	return a.restoreDisk(ctx, from, p, o, opts, unknown, bar)
}

// restoreInto restores one disk into a directory, which is made if it does not
// exist, under the name that it would have beside the others.
func (a *app) restoreInto(ctx context.Context, from restore.Repository, p *point.RestorePoint, o restoreOptions, opts restore.Options, unknown error, bar *bar) error {
	d, err := selectDisk(p, o.disk)
	if err != nil {
		return err
	}
	dir := filepath.Clean(o.to)
	name, format := restore.FileOf(p, d.ID, opts.Format)
	opts.Format, o.to, o.disk = format, filepath.Join(dir, name), string(d.ID)
	if err := o.check(format); err != nil {
		return err
	}
	made := os.Mkdir(dir, 0o755) == nil
	err = a.restoreDisk(ctx, from, p, o, opts, unknown, bar)
	if err != nil && made {
		os.Remove(dir) // it is empty
	}
	return err
}

// selectDisk is restore.Select with a hint.
func selectDisk(p *point.RestorePoint, disk string) (point.Disk, error) {
	d, err := restore.Select(p, disk)
	if err == nil {
		return d, nil
	}
	var names []string
	for _, d := range p.Disks {
		names = append(names, string(d.ID))
	}
	if len(names) == 0 {
		return d, err
	}
	return d, withHint(err, "say --disk with one of: %s", strings.Join(names, ", "))
}

// restoreHint says what to do about a restore that failed because of its
// target.
func restoreHint(err error, to string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fault.ErrNoSpace):
		return withHint(err, "free space for %s or choose another target; nothing half-made is left", to)
	case errors.Is(err, fault.ErrReadOnly), errors.Is(err, fs.ErrPermission):
		return withHint(err, "make %s writable for this user, or choose another target", to)
	}
	return err
}

// isDirectory says whether a target is meant to be a directory.
func isDirectory(to string) bool {
	if strings.HasSuffix(to, "/") || strings.HasSuffix(to, string(os.PathSeparator)) {
		return true
	}
	st, err := os.Stat(to)
	return err == nil && st.IsDir()
}

// restoreDisk restores one disk to a file. unknown is why its sectors are not
// known, if they are not.
func (a *app) restoreDisk(ctx context.Context, from restore.Repository, p *point.RestorePoint, o restoreOptions, opts restore.Options, unknown error, bar *bar) error {
	d, err := selectDisk(p, o.disk)
	if err != nil {
		return err
	}
	if opts.Format == "" && !o.inPlace && restore.FormatOf(o.to) == "" {
		return usage("%s: its extension names no format: say --format %s", o.to, oneOf(formatWords()))
	}
	if !o.inPlace {
		// Say what is wrong with the target before the disk is looked up.
		if st, err := os.Stat(filepath.Dir(o.to)); err != nil || !st.IsDir() {
			return withHint(fmt.Errorf("directory %s: %w", filepath.Dir(o.to), fault.ErrNotFound), "make it first, or choose another target")
		}
	}
	src, err := from.OpenDisk(ctx, d.Manifest)
	if err != nil {
		return fmt.Errorf("restore %s: disk %s: %w", p.Ref(), d.ID, err)
	}
	defer src.Close()
	var res restore.Result
	if o.inPlace {
		if res, err = restore.InPlace(ctx, from, src, o.to, opts); err != nil {
			_, half := os.Stat(restore.Marker(o.to))
			switch _, there := os.Stat(o.to); {
			case half == nil:
				err = withHint(err, "%s is half-done; run the same command again to complete it", o.to)
			case errors.Is(there, fs.ErrNotExist):
				err = withHint(err, "without --in-place a new image is made")
			}
		}
	} else {
		res, err = restore.Disk(ctx, d.ID, src, o.to, opts)
		err = restoreHint(err, o.to)
	}
	bar.end()
	if err != nil {
		return fmt.Errorf("restore %s: disk %s: %w", p.Ref(), d.ID, err)
	}
	res.Disk = d.ID
	all := restore.PointResult{Point: p.Ref(), Target: o.to, Disks: []restore.Result{res}, Duration: res.Duration}
	if o.inPlace { // the image keeps its own sectors
		return a.reportRestore(all)
	}
	return a.reportDisks(all, opts.Sectors, unknown)
}

// reportDisks reports a restore to images, and warns of disks whose images
// can't say what sectors they had.
func (a *app) reportDisks(res restore.PointResult, sectors map[vm.DiskID]int, unknown error) error {
	res.Warnings = sectorsLost(res.Disks, sectors)
	if unknown != nil {
		res.Warnings = append(res.Warnings, unknown.Error())
	}
	if err := a.reportRestore(res); err != nil {
		return err
	}
	return a.warned(res.Warnings)
}

// sectorsOf are the disks of a VM whose sectors are not of 512 bytes.
func sectorsOf(def vm.Definition) map[vm.DiskID]int {
	out := map[vm.DiskID]int{}
	for _, d := range def.Disks {
		if d.SectorBytes == 4096 { // there are no others
			out[d.ID] = d.SectorBytes
		}
	}
	return out
}

// sectorsLost names the disks that had other sectors than the restored ones say.
func sectorsLost(disks []restore.Result, sectors map[vm.DiskID]int) (warnings []string) {
	for _, d := range disks {
		if n := sectors[d.Disk]; n > 0 && n != d.SectorBytes {
			warnings = append(warnings, fmt.Sprintf("disk %s had sectors of %d bytes, and the restored one is not marked so: a guest that is shown sectors of 512 bytes finds no partitions on it; a VHDX is marked", d.Disk, n))
		}
	}
	return warnings
}

func (a *app) reportRestore(res restore.PointResult) error {
	if a.json {
		return a.printJSON(res)
	}
	fmt.Fprintf(a.stdout, "restored %s to %s in %s\n", res.Point, res.Target, timeText(res.Duration))
	for _, d := range res.Disks {
		fmt.Fprintf(a.stdout, "  %s: %s, %s, %s", d.Disk, d.Target, d.Format, sizeText(d.SizeBytes))
		if d.ComparedBytes > 0 {
			fmt.Fprintf(a.stdout, ", compared %s, wrote %s, zeroed %s", sizeText(d.ComparedBytes), sizeText(d.WrittenBytes), sizeText(d.ZeroedBytes))
		} else {
			fmt.Fprintf(a.stdout, ", wrote %s, the rest is holes", sizeText(d.WrittenBytes))
		}
		fmt.Fprintln(a.stdout)
	}
	for _, f := range res.Files {
		fmt.Fprintf(a.stdout, "  %s\n", f)
	}
	if res.VM != nil {
		a.reportBuilt(*res.VM)
	}
	return nil
}

func (a *app) reportBuilt(b hypervisor.Built) {
	state := "off"
	if b.Running {
		state = "running"
	}
	fmt.Fprintf(a.stdout, "  VM %s (%s) is %s\n", b.Name, b.UUID, state)
	for _, k := range b.Kept {
		if k.Path == "" {
			fmt.Fprintf(a.stdout, "  %s: the old disk was removed\n", k.Disk)
		} else {
			fmt.Fprintf(a.stdout, "  %s: the old disk is kept as %s\n", k.Disk, k.Path)
		}
	}
	for _, n := range b.Notes {
		fmt.Fprintf(a.stdout, "  note: %s\n", n)
	}
}

func (a *app) restoreVM(ctx context.Context, from restore.Repository, p *point.RestorePoint, dst source, o restore.VMOptions, bus string, bar *bar) error {
	d, err := a.openKVM(ctx, dst, kvm.Options{})
	if err != nil {
		return err
	}
	defer d.Close()
	host := kvmHost{d: d, bus: bus}
	if _, own := p.Config["domain.xml"]; own && bus != "" {
		return usage("--bus: %s has libvirt's own definition of the VM, whose disks stay where they were", p.Ref())
	} else if !own {
		def, known, err := definitionOf(ctx, from, p)
		if err != nil {
			return err
		}
		if known {
			host.def = &def
		}
	}
	res, err := restore.VM(ctx, from, p, host, o)
	bar.end()
	if errors.Is(err, fault.ErrExists) {
		err = withHint(err, "choose another name: a restore never replaces a VM")
	}
	if errors.Is(err, fault.ErrNoSpace) {
		err = withHint(err, "free space in the host's image directory, or restore to another place with --to DIR/; nothing half-made is left")
	}
	if err != nil {
		return err
	}
	if err := a.reportRestore(res); err != nil {
		return err
	}
	return a.warned(res.Warnings)
}

// kvmHost makes the KVM driver a place for restored VMs.
type kvmHost struct {
	d   *kvm.Driver
	def *vm.Definition // of a VM of another hypervisor; nil for none
	bus string
}

func (h kvmHost) Exists(ctx context.Context, name string) (bool, error) {
	machines, err := h.d.Machines(ctx)
	for _, m := range machines {
		if m.Name == name {
			return true, nil
		}
	}
	return false, err
}

func (h kvmHost) ImageDir(ctx context.Context) (string, error) { return h.d.ImageDir(ctx) }

func (h kvmHost) Define(ctx context.Context, d restore.Definition) (hypervisor.Built, error) {
	o := kvm.DefineOptions{
		Name: d.Name, Machine: &d.Machine, Definition: h.def, Bus: h.bus, DomainXML: d.Config["domain.xml"], NVRAM: d.Config["nvram"], Start: d.Start,
		Disks: map[vm.DiskID]string{}, DiskFormats: map[vm.DiskID]string{},
	}
	for id, img := range d.Disks {
		o.Disks[id] = img.Path
		o.DiskFormats[id] = string(img.Format)
	}
	return h.d.Define(ctx, o)
}
