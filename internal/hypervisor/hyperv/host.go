package hyperv

import (
	"context"
	"iter"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/wsman"
)

// management is what the driver asks of a host's WMI classes. Its methods are
// those of a wsman.Client.
type management interface {
	Query(ctx context.Context, wql string) iter.Seq2[*wsman.Instance, error]
	Get(ctx context.Context, ref wsman.Ref) (*wsman.Instance, error)
	Invoke(ctx context.Context, ref wsman.Ref, method string, args ...wsman.Argument) (*wsman.Instance, error)
	Close() error
}

// files is how a host's files are reached, under the names that the host knows
// them by. Its methods are safe for concurrent use.
type files interface {
	// open opens a file that others may have open for writing.
	open(ctx context.Context, name string) (image.File, error)
	// list names the files of a folder.
	list(ctx context.Context, folder string) ([]string, error)
	size(ctx context.Context, name string) (int64, error)
	// space is that of the volume on which a file is, in bytes.
	space(ctx context.Context, name string) (free, total int64, err error)
	// share names the share by which a file is reached; image.ErrNotAllowed
	// where none is.
	share(name string) (string, error)
	close() error

	// create makes a file and mkdir a folder, which must not exist:
	// fault.ErrExists. The folder around it must: fault.ErrNotFound.
	create(ctx context.Context, name string) (image.Output, error)
	mkdir(ctx context.Context, name string) error
	// remove removes a file or an empty folder. rename leaves it where it was
	// if the new name is taken.
	remove(ctx context.Context, name string) error
	rename(ctx context.Context, from, to string) error
	// room fails with fault.ErrNoSpace where a folder's volume has not so many
	// bytes.
	room(ctx context.Context, folder string, bytes int64) error
}

// Classes that more than one file speaks of.
const (
	classSystem     = "Msvm_ComputerSystem"
	classSettings   = "Msvm_VirtualSystemSettingData"
	classComponent  = "Msvm_VirtualSystemSettingDataComponent" // ties settings to a state of a VM
	classReference  = "Msvm_VirtualSystemReferencePoint"
	classAffected   = "Msvm_AffectedJobElement"
	classSnapshots  = "Msvm_VirtualSystemSnapshotService"
	classReferences = "Msvm_VirtualSystemReferencePointService"
	classImages     = "Msvm_ImageManagementService"
	classManagement = "Msvm_VirtualSystemManagementService"
)

// instance names the one of class with that InstanceID.
func instance(class, id string) wsman.Ref { return wsman.NewRef(class, "InstanceID", id) }

// service names the one instance of a class of which a host has no more.
func service(class string) wsman.Ref { return wsman.NewRef(class, "CreationClassName", class) }

func systemRef(name string) wsman.Ref {
	return wsman.NewRef(classSystem, "CreationClassName", classSystem, "Name", name)
}

// parseRef reads what a Ref's String wrote, or a host; the zero Ref where text
// is no reference.
func parseRef(text string) wsman.Ref {
	r, err := wsman.ParseRef(text)
	if err != nil {
		return wsman.Ref{}
	}
	return r
}

// associated queries for the instances of class that assoc ties to r.
func associated(r wsman.Ref, assoc, class string) string {
	return "ASSOCIATORS OF {" + r.Path() + "} WHERE AssocClass = " + assoc + " ResultClass = " + class
}

// An object is what a host gave: an instance, or a method's results. Its
// methods take what is missing, or of another kind, for nothing: whoever must
// have it looks.
type object struct{ *wsman.Instance }

func (o object) text(name string) string {
	if all := o.list(name); len(all) > 0 {
		return all[0]
	}
	return ""
}

func (o object) list(name string) []string {
	all, _ := wsman.Props[string](o.Instance, name)
	return all
}

func (o object) number(name string) (int64, bool) {
	all, ok := o.numbers(name)
	if !ok || len(all) == 0 {
		return 0, false
	}
	return all[0], true
}

// numbers is false where one of them is none, or is more than fits.
func (o object) numbers(name string) ([]int64, bool) {
	all, err := wsman.Props[int64](o.Instance, name)
	return all, err == nil
}

func (o object) truth(name string) bool {
	b, err := wsman.PropOr(o.Instance, name, false)
	return err == nil && b
}

// ref is the zero Ref where there is none.
func (o object) ref(name string) wsman.Ref {
	if all, err := wsman.Props[wsman.Ref](o.Instance, name); err == nil && len(all) > 0 {
		return all[0]
	}
	return wsman.Ref{}
}

// embedded are the instances that a property holds as texts. Those that can't
// be read are left out.
func (o object) embedded(name string) (out []object) {
	for _, text := range o.list(name) {
		if in, err := wsman.ParseInstance(text); err == nil {
			out = append(out, object{in})
		}
	}
	return out
}
