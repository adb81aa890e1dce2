package hyperv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
)

// States of a VM, as the host numbers them: first CIM's, then its own.
const (
	stateRunning = 2
	stateOff     = 3
	stateSaved   = 6
	statePaused  = 9
)

var stateNames = map[int64]string{
	stateRunning: "running", stateOff: "shut off", stateSaved: "saved", statePaused: "paused", 4: "shutting down", 10: "starting",
	32768: "paused", 32769: "saved", 32770: "starting", 32771: "taking a snapshot", 32773: "saving", 32774: "stopping",
	32776: "pausing", 32777: "resuming",
}

// Kinds of settings of a VM.
const (
	typeRealized   = "Microsoft:Hyper-V:System:Realized"
	typeCheckpoint = "Microsoft:Hyper-V:Snapshot:Realized" // a user's
	typeRecovery   = "Microsoft:Hyper-V:Snapshot:Recovery" // a backup's
)

// A system is one VM of the host.
type system struct {
	guid  string // lower case, without braces
	name  string // as people call it; not unique
	state int64
	ref   wsman.Ref
}

var guidText = regexp.MustCompile(`^\{?[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\}?$`)

func guidOf(text string) (string, bool) {
	return strings.ToLower(strings.Trim(text, "{}")), guidText.MatchString(text)
}

// systems lists all VMs. The host is an instance of their class, too, and is
// told from them by its name, which is no GUID; what it says of itself
// otherwise is in its own language.
func (c *client) systems(ctx context.Context) (host string, list []system, err error) {
	all, err := c.query(ctx, "SELECT * FROM "+classSystem)
	if err != nil {
		return "", nil, fmt.Errorf("list the VMs: %w", err)
	}
	for _, o := range all {
		guid, ok := guidOf(o.text("Name"))
		if !ok {
			host = o.text("Name")
			continue
		}
		s := system{guid: guid, name: o.text("ElementName"), ref: systemRef(o.text("Name"))}
		s.state, _ = o.number("EnabledState")
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b system) int {
		return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.guid, b.guid))
	})
	return host, list, nil
}

// An AmbiguousError is a name that several VMs have.
type AmbiguousError struct {
	Name  string
	GUIDs []string
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("%d VMs are called %q; name one by its GUID: %s", len(e.GUIDs), e.Name, strings.Join(e.GUIDs, ", "))
}

// choose finds the VM of that name or GUID.
func choose(list []system, name string) (system, error) {
	var found []system
	guid, isGUID := guidOf(name)
	for _, s := range list {
		switch {
		case isGUID && s.guid == guid:
			return s, nil
		case s.name == name:
			found = append(found, s)
		}
	}
	switch len(found) {
	case 0:
		return system{}, fmt.Errorf("VM %q: %w", name, fault.ErrNotFound)
	case 1:
		return found[0], nil
	}
	e := &AmbiguousError{Name: name}
	for _, s := range found {
		e.GUIDs = append(e.GUIDs, s.guid)
	}
	return system{}, e
}

// A settings is one state of a VM: the present one, or a checkpoint's.
type settings struct {
	object
	id  string // InstanceID
	ref wsman.Ref
}

func asSettings(o object) settings {
	id := o.text("InstanceID")
	return settings{o, id, instance(classSettings, id)}
}

// present is what a VM is now.
func (c *client) present(ctx context.Context, s system) (settings, error) {
	return c.state(ctx, s, typeRealized)
}

// state is what a VM is in that kind of settings, of which it has one.
func (c *client) state(ctx context.Context, s system, kind string) (settings, error) {
	list, err := c.query(ctx, associated(s.ref, "Msvm_SettingsDefineState", classSettings))
	if err != nil {
		return settings{}, fmt.Errorf("read its settings: %w", err)
	}
	for _, o := range list {
		if o.text("VirtualSystemType") == kind {
			return asSettings(o), nil
		}
	}
	return settings{}, fmt.Errorf("its settings are not among the %d that the host gives: %w", len(list), fault.ErrNotFound)
}

// checkpoints are a VM's checkpoints of the kinds that are asked for.
func (c *client) checkpoints(ctx context.Context, s system, kinds ...string) ([]settings, error) {
	list, err := c.query(ctx, associated(s.ref, "Msvm_SnapshotOfVirtualSystem", classSettings))
	if err != nil {
		return nil, fmt.Errorf("list its checkpoints: %w", err)
	}
	var out []settings
	for _, o := range list {
		if slices.Contains(kinds, o.text("VirtualSystemType")) {
			out = append(out, asSettings(o))
		}
	}
	return out, nil
}

// tracks says whether a VM of that configuration version can have its changes
// tracked.
func tracks(version string) bool {
	major, minor, _ := strings.Cut(version, ".")
	a, err := strconv.Atoi(major)
	b, err2 := strconv.Atoi(minor)
	return err == nil && (a > 6 || a == 6 && err2 == nil && b >= 2)
}

// Kinds of devices.
const (
	typeIDE   = 5
	typeSCSI  = 6
	subDisk   = "Microsoft:Hyper-V:Virtual Hard Disk"
	subDirect = "Microsoft:Hyper-V:Physical Disk Drive"
)

// A drive is a disk as a VM's settings have it.
type drive struct {
	vm.Disk
	device  string // of its setting's id: what it keeps in every checkpoint
	setting string // InstanceID of its setting
}

// drives reads the disks of one state of a VM, without their sizes.
func (c *client) drives(ctx context.Context, of wsman.Ref) ([]drive, error) {
	storage, err := c.storage(ctx, of)
	if err != nil {
		return nil, err
	}
	devices, err := c.query(ctx, associated(of, classComponent, "Msvm_ResourceAllocationSettingData"))
	if err != nil {
		return nil, fmt.Errorf("list its controllers: %w", err)
	}
	return arrange(storage, devices), nil
}

// fibres are a VM's Fibre Channel adapters, by which it reaches disks that
// nobody else sees. Their class stands beside that of other devices, which
// therefore never lists them. A host that knows no such class has none.
func (c *client) fibres(ctx context.Context, of wsman.Ref) ([]object, error) {
	list, err := c.query(ctx, associated(of, classComponent, classFibre))
	switch {
	case errors.Is(err, wsman.ErrNoClass), errors.Is(err, fault.ErrUnsupported):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("list its Fibre Channel adapters: %w", err)
	}
	return list, nil
}

// storage are the settings of a VM's disks, of DVDs and floppies too.
func (c *client) storage(ctx context.Context, of wsman.Ref) ([]object, error) {
	list, err := c.query(ctx, associated(of, classComponent, "Msvm_StorageAllocationSettingData"))
	if err != nil {
		return nil, fmt.Errorf("list its disks: %w", err)
	}
	return list, nil
}

// sources are the files that a VM's disks are in. It costs one request, and
// drives two.
func (c *client) sources(ctx context.Context, of wsman.Ref) (files []string, err error) {
	list, err := c.storage(ctx, of)
	for _, o := range list {
		if file := o.text("HostResource"); file != "" && o.text("ResourceSubType") == subDisk {
			files = append(files, file)
		}
	}
	return files, err
}

// deviceOf is what an InstanceID says of a device besides whose it is:
// Microsoft:<VM or checkpoint>\<device>.
func deviceOf(id string) string {
	_, device, _ := strings.Cut(id, `\`)
	return strings.ToLower(device)
}

// arrange makes disks of what hangs where.
func arrange(storage, devices []object) (list []drive) {
	byDevice := map[string]object{}
	var scsi []string
	for _, o := range devices {
		device := deviceOf(o.text("InstanceID"))
		byDevice[device] = o
		if n, _ := o.number("ResourceType"); n == typeSCSI {
			scsi = append(scsi, device)
		}
	}
	// Hosts don't number SCSI controllers; the order of their ids stays.
	slices.Sort(scsi)
	parent := func(o object) (object, string) {
		device := deviceOf(parseRef(o.text("Parent")).Key("InstanceID"))
		on, ok := byDevice[device]
		if !ok { // hosts may have kinds that we do not ask for
			on = object{wsman.NewInstance("")}
		}
		return on, device
	}
	// place is where a drive hangs: "scsi0:3".
	place := func(d object, device string) (vm.DiskID, string) {
		controller, name := parent(d)
		slot, ok := d.number("AddressOnParent")
		switch n, _ := controller.number("ResourceType"); {
		case ok && n == typeSCSI:
			return vm.DiskID(fmt.Sprintf("scsi%d:%d", slices.Index(scsi, name), slot)), "scsi"
		case ok && n == typeIDE:
			if at, has := controller.number("Address"); has {
				return vm.DiskID(fmt.Sprintf("ide%d:%d", at, slot)), "ide"
			}
		}
		return vm.DiskID(strings.ReplaceAll(device, `\`, "-")), ""
	}
	for _, o := range storage {
		if o.text("ResourceSubType") != subDisk {
			continue // a DVD, a floppy
		}
		d := drive{device: deviceOf(o.text("InstanceID")), setting: o.text("InstanceID")}
		on, device := parent(o)
		d.ID, d.Bus = place(on, device)
		d.Source = o.text("HostResource")
		d.Format, d.Excluded = formatOf(d.Source, o.truth("PersistentReservationsSupported"))
		list = append(list, d)
	}
	for _, o := range devices {
		if o.text("ResourceSubType") != subDirect {
			continue
		}
		device := deviceOf(o.text("InstanceID"))
		if len(o.list("HostResource")) == 0 || o.text("HostResource") == "" {
			continue // a drive with no disk in it
		}
		d := drive{device: device}
		d.ID, d.Bus = place(o, device)
		d.Source, d.Format, d.Excluded = o.text("HostResource"), "raw", reasonDirect
		list = append(list, d)
	}
	slices.SortFunc(list, func(a, b drive) int { return compareIDs(a.ID, b.ID) })
	return list
}

// compareIDs orders disks by controller and slot, numbers as numbers.
func compareIDs(a, b vm.DiskID) int {
	for i := 0; i < min(len(a), len(b)); i++ {
		if a[i] != b[i] && digits(a[i:]) != digits(b[i:]) {
			return cmp.Compare(digits(a[i:]), digits(b[i:]))
		}
		if a[i] != b[i] {
			break
		}
	}
	return cmp.Compare(a, b)
}

func digits(s vm.DiskID) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}

// Reasons why a disk is not protected.
const (
	reasonRequest = "excluded on request"
	reasonDirect  = "it is a disk of the host that is passed through, of which no checkpoint can be taken; back it up from within the guest"
	reasonSet     = "it is a VHD set, which several VMs share; back it up from within the guest"
	reasonShared  = "several VMs share it, so that no checkpoint of one holds it still; back it up from within the guest"
	reasonFormat  = "its file is neither VHDX nor VHD"
	reasonNoFile  = "its settings name no file"
)

func formatOf(source string, shared bool) (format, excluded string) {
	dot := strings.LastIndexByte(source, '.')
	if source == "" {
		return "", reasonNoFile
	}
	switch strings.ToLower(source[dot+1:]) {
	case "vhdx", "avhdx":
		format = "vhdx"
	case "vhd", "avhd":
		format = "vhd"
	case "vhds":
		return "vhdx", reasonSet
	default:
		return "", reasonFormat
	}
	if shared {
		return format, reasonShared
	}
	return format, ""
}

// sizeOf asks the host for the size of a disk that may be in use; 0 where it
// doesn't tell.
func (c *client) sizeOf(ctx context.Context, file string) int64 {
	out, err := c.do(ctx, familyImage, service(classImages), "GetVirtualHardDiskSettingData", wsman.Arg("Path", wsman.Of(file)))
	if err != nil {
		return 0
	}
	for _, o := range out.embedded("SettingData") {
		if n, ok := o.number("MaxInternalSize"); ok && n > 0 {
			return n
		}
	}
	return 0
}

// hasReferencePoints is false for hosts before Windows Server 2016, which
// don't know the class. A host whose management restarts answers the same, but
// not for what every host has.
func (c *client) hasReferencePoints(ctx context.Context) (bool, error) {
	for again := false; ; again = true {
		list, err := c.query(ctx, "SELECT * FROM "+classReferences)
		switch {
		case errors.Is(err, wsman.ErrNoClass), errors.Is(err, fault.ErrNotFound), errors.Is(err, fault.ErrUnsupported):
		case err != nil:
			return false, fmt.Errorf("whether it has reference points: %w", err)
		case len(list) > 0:
			return true, nil
		}
		if again {
			return false, nil
		}
		if list, err = c.query(ctx, "SELECT * FROM "+classSnapshots); err != nil || len(list) == 0 {
			return false, errors.Join(errors.New("the host does not answer for its virtual machines at present"), err)
		}
	}
}
