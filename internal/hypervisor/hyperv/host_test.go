package hyperv

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/wsman"
)

const (
	vmGUID   = "4c5b8d2a-1111-2222-3333-0123456789ab"
	diskSize = 4 << 20
	folderVM = `C:\VMs\web01\`
)

// A fakeHost is a host with one VM that has one disk, scsi0:0, as far as the
// driver asks: enough to fail at every step. It is no simulator, and has no
// protocol; sim/hyperv has.
type fakeHost struct {
	t   *testing.T
	dir string

	mu         sync.Mutex
	disk       []byte
	log        []written
	base       image.Info
	state      uint16
	version    string
	modern     bool
	vss        []uint16 // status of the guest's service for backups; nil for none
	osName     string
	extra      []*wsman.Instance // further storage settings
	twins      int               // VMs of the same name, besides
	gone       bool
	snapshots  []*fakeSnapshot
	references []*fakeReference
	jobs       map[string]*fakeJob
	serial     int
	epoch      int // of change tracking: an id of an older one is unknown
	delta      int64
	free       int64
	rows       bool // a job's effects are told

	// invoke is asked before each call; what it gives instead of nil is the
	// answer. get likewise.
	invoke func(method string, args map[string]wsman.Value) (*wsman.Instance, error)
	get    func(ref wsman.Ref) (*wsman.Instance, error)
	query  func(wql string) error // likewise, for errors alone
	calls  []string
	node   string // as it calls itself
}

type written struct{ seq, off, n int64 }

type fakeSnapshot struct {
	id, kind, name, file string
	seq                  int64
}

type fakeReference struct {
	id    string
	seq   int64
	epoch int
}

type fakeJob struct {
	id      string
	polls   int // until it ends
	end     func() (made wsman.Ref, err string)
	ended   bool
	made    wsman.Ref
	state   uint16
	errText string
}

func newFakeHost(t *testing.T) *fakeHost {
	h := &fakeHost{t: t, dir: imagetest.MemoryDir(t), disk: make([]byte, diskSize), state: stateRunning, version: "9.0", modern: true,
		vss: []uint16{2}, osName: "Windows Server 2022", jobs: map[string]*fakeJob{}, free: 100 << 30, rows: true, node: "HV01"}
	w, err := vhdx.Create(filepath.Join(h.dir, "web01.vhdx"), image.CreateOptions{VirtualBytes: diskSize, BlockBytes: 1 << 20})
	if err == nil {
		err = w.Finish()
	}
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	f, err := image.OpenFile(filepath.Join(h.dir, "web01.vhdx"))
	if err != nil {
		t.Fatal(err)
	}
	img, err := vhdx.Open(f, nil)
	if err != nil {
		t.Fatal(err)
	}
	h.base = img.Info()
	img.Close()
	return h
}

// driver is a Driver of the host that does not wait long.
func (h *fakeHost) driver(state string, o Options) *Driver {
	o.Host, o.StateDir = &url.URL{Scheme: "hyperv", Host: "hv01"}, state
	d := newDriver(h, fakeFiles{h}, o)
	d.poll, d.patience, d.settleTime, d.busyTime, d.watchTime = time.Millisecond, 50*time.Millisecond, 30*time.Second, 20*time.Millisecond, 5*time.Millisecond
	return d
}

func (h *fakeHost) write(off int64, p []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	copy(h.disk[off:], p)
	h.log = append(h.log, written{int64(len(h.log)) + 1, off, int64(len(p))})
}

func (h *fakeHost) next() int { h.serial++; return h.serial }

// freeze writes what the disk holds into a file of its own, over the base.
func (h *fakeHost) freeze() string {
	name := fmt.Sprintf("web01_%d.avhdx", h.next())
	if len(h.snapshots) > 0 { // the file that the guest writes to stands still
		name = strings.TrimPrefix(h.active(), folderVM)
		os.Remove(filepath.Join(h.dir, name))
	}
	w, err := vhdx.Create(filepath.Join(h.dir, name), image.CreateOptions{VirtualBytes: diskSize, BlockBytes: 1 << 20,
		Parent: `.\web01.vhdx`, ParentFormat: image.VHDX, ParentInfo: &h.base})
	if err == nil {
		for off := int64(0); off < diskSize && err == nil; off += 1 << 20 {
			if p := h.disk[off : off+1<<20]; bytes.ContainsFunc(p, func(r rune) bool { return r != 0 }) {
				_, err = w.WriteAt(p, off)
			}
		}
	}
	if err == nil {
		err = w.Finish()
	}
	if err != nil {
		h.t.Errorf("freeze: %v", err)
	}
	w.Close()
	return name
}

// active is the file that the guest writes to.
func (h *fakeHost) active() string {
	if n := len(h.snapshots); n > 0 {
		return folderVM + strings.TrimSuffix(h.snapshots[n-1].file, ".avhdx") + "-delta.avhdx"
	}
	return folderVM + "web01.vhdx"
}

func (h *fakeHost) settings(id, kind, name string) *wsman.Instance {
	return wsman.NewInstance(classSettings).Set("InstanceID", wsman.Of(id)).Set("VirtualSystemType", wsman.Of(kind)).
		Set("ElementName", wsman.Of(name)).Set("Version", wsman.Of(h.version)).Set("VirtualSystemIdentifier", wsman.Of(strings.ToUpper(vmGUID))).
		Set("VirtualSystemSubType", wsman.Of("Microsoft:Hyper-V:SubType:2")).Set("SecureBootEnabled", wsman.Of(true))
}

func (h *fakeHost) system(guid, name string) *wsman.Instance {
	return wsman.NewInstance(classSystem).Set("Name", wsman.Of(strings.ToUpper(guid))).Set("ElementName", wsman.Of(name)).Set("EnabledState", wsman.Of(h.state))
}

const (
	devController = `CTL-1\0`
	devDrive      = `CTL-1\0\0\D`
	devDisk       = `CTL-1\0\0\L`
)

// components are the devices of the settings with that id.
func (h *fakeHost) components(id, class string) (out []*wsman.Instance) {
	owner := strings.TrimPrefix(id, "Microsoft:")
	file := h.active()
	for _, s := range h.snapshots {
		if s.id == id {
			file = folderVM + s.file
		}
	}
	of := func(device string) string { return "Microsoft:" + owner + `\` + device }
	parent := func(device string) wsman.Value {
		return wsman.Of(`\\HV01\root\virtualization\v2:` + instance("Msvm_ResourceAllocationSettingData", of(device)).Path())
	}
	switch class {
	case "Msvm_ResourceAllocationSettingData":
		return []*wsman.Instance{
			wsman.NewInstance(class).Set("InstanceID", wsman.Of(of(devController))).Set("ResourceType", wsman.Of(uint16(typeSCSI))),
			wsman.NewInstance(class).Set("InstanceID", wsman.Of(of(devDrive))).Set("ResourceType", wsman.Of(uint16(17))).
				Set("ResourceSubType", wsman.Of("Microsoft:Hyper-V:Synthetic Disk Drive")).Set("AddressOnParent", wsman.Of("0")).Set("Parent", parent(devController)),
		}
	case "Msvm_StorageAllocationSettingData":
		return append([]*wsman.Instance{
			wsman.NewInstance(class).Set("InstanceID", wsman.Of(of(devDisk))).Set("ResourceSubType", wsman.Of(subDisk)).
				Set("HostResource", wsman.List(file)).Set("Parent", parent(devDrive)),
		}, h.extra...)
	case "Msvm_ProcessorSettingData":
		return []*wsman.Instance{wsman.NewInstance(class).Set("VirtualQuantity", wsman.Of(uint64(4)))}
	case "Msvm_MemorySettingData":
		return []*wsman.Instance{wsman.NewInstance(class).Set("VirtualQuantity", wsman.Of(uint64(2048))).
			Set("DynamicMemoryEnabled", wsman.Of(true)).Set("Limit", wsman.Of(uint64(8192)))}
	}
	return nil
}

var wqlAssociators = regexp.MustCompile(`^ASSOCIATORS OF \{(.*)\} WHERE AssocClass = (\w+) ResultClass = (\w+)$`)

func (h *fakeHost) answer(wql string) (out []*wsman.Instance) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch wql {
	case "SELECT * FROM " + classSystem:
		out = append(out, wsman.NewInstance(classSystem).Set("Name", wsman.Of(h.node)).Set("ElementName", wsman.Of(h.node)))
		if !h.gone {
			out = append(out, h.system(vmGUID, "web01"))
		}
		for i := range h.twins {
			out = append(out, h.system(fmt.Sprintf("4c5b8d2a-1111-2222-3333-%012d", i), "web01"))
		}
		return out
	case "SELECT * FROM " + classReferences:
		if h.modern {
			out = append(out, wsman.NewInstance(classReferences))
		}
		return out
	case "SELECT * FROM " + classSnapshots:
		return append(out, wsman.NewInstance(classSnapshots))
	case "SELECT * FROM " + classAffected:
		for _, j := range h.jobs {
			if j.ended && j.made.Class != "" && h.rows {
				out = append(out, wsman.NewInstance(classAffected).Set("AffectingElement", wsman.Of(instance("Msvm_ConcreteJob", j.id))).
					Set("AffectedElement", wsman.Of(j.made)).Set("ElementEffects", wsman.List(uint16(0), uint16(effectCreate))))
			}
		}
		return out
	}
	m := wqlAssociators.FindStringSubmatch(wql)
	if m == nil {
		h.t.Errorf("a query that the host does not know: %s", wql)
		return nil
	}
	ref, err := wsman.ParseRef(m[1])
	if err != nil {
		h.t.Errorf("%s: %v", wql, err)
	}
	switch m[2] {
	case "Msvm_SettingsDefineState":
		out = append(out, h.settings("Microsoft:"+strings.ToUpper(vmGUID), typeRealized, "web01"))
	case "Msvm_SnapshotOfVirtualSystem":
		for _, s := range h.snapshots {
			out = append(out, h.settings(s.id, s.kind, s.name))
		}
	case "Msvm_ReferencePointOfVirtualSystem":
		for _, r := range h.references {
			out = append(out, h.reference(r))
		}
	case "Msvm_VirtualSystemSettingDataComponent":
		out = h.components(ref.Key("InstanceID"), m[3])
	case "Msvm_SystemDevice":
		switch m[3] {
		case "Msvm_VssComponent":
			if h.vss != nil {
				out = append(out, wsman.NewInstance(m[3]).Set("OperationalStatus", wsman.List(h.vss...)).Set("StatusDescriptions", wsman.List("as it is")))
			}
		case "Msvm_KvpExchangeComponent":
			item, _ := wsman.NewInstance("Msvm_KvpExchangeDataItem").Set("Name", wsman.Of("OSName")).Set("Data", wsman.Of(h.osName)).MarshalText()
			out = append(out, wsman.NewInstance(m[3]).Set("GuestIntrinsicExchangeItems", wsman.List(string(item))))
		}
	}
	return out
}

func (h *fakeHost) reference(r *fakeReference) *wsman.Instance {
	return wsman.NewInstance(classReference).Set("InstanceID", wsman.Of(r.id)).
		Set("VirtualDiskIdentifiers", wsman.List("Microsoft:"+strings.ToUpper(vmGUID)+`\`+devDisk)).
		Set("ResilientChangeTrackingIdentifiers", wsman.List(fmt.Sprintf("rct:%d:%d", r.epoch, r.seq)))
}

func (h *fakeHost) Query(ctx context.Context, wql string) iter.Seq2[*wsman.Instance, error] {
	return func(yield func(*wsman.Instance, error) bool) {
		if ctx.Err() != nil {
			yield(nil, ctx.Err())
			return
		}
		if h.query != nil {
			if err := h.query(wql); err != nil {
				yield(nil, err)
				return
			}
		}
		for _, in := range h.answer(wql) {
			if !yield(in, nil) {
				return
			}
		}
	}
}

func (h *fakeHost) Get(ctx context.Context, ref wsman.Ref) (*wsman.Instance, error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.get != nil {
		if in, err := h.get(ref); in != nil || err != nil {
			return in, err
		}
	}
	id := ref.Key("InstanceID")
	switch ref.Class {
	case "Msvm_ConcreteJob":
		if j := h.jobs[id]; j != nil {
			if j.polls--; j.polls < 0 && !j.ended {
				j.ended, j.state = true, jobCompleted
				if j.made, j.errText = j.end(); j.errText != "" {
					j.state = jobException
				}
			}
			return wsman.NewInstance(ref.Class).Set("JobState", wsman.Of(j.state)).Set("ErrorCode", wsman.Of(uint16(0))).Set("ErrorDescription", wsman.Of(j.errText)), nil
		}
	case classSettings:
		for _, s := range h.snapshots {
			if s.id == id {
				return h.settings(s.id, s.kind, s.name), nil
			}
		}
	case classReference:
		for _, r := range h.references {
			if r.id == id {
				return h.reference(r), nil
			}
		}
	case classSystem:
		if !h.gone {
			return h.system(vmGUID, "web01"), nil
		}
	}
	return nil, fmt.Errorf("%s: %w", ref, fault.ErrNotFound)
}

func done(code uint32) *wsman.Instance {
	return wsman.NewInstance("").Set("ReturnValue", wsman.Of(code))
}

func (h *fakeHost) begin(polls int, end func() (wsman.Ref, string)) *wsman.Instance {
	j := &fakeJob{id: fmt.Sprintf("job-%d", h.next()), polls: polls, end: end, state: jobRunning}
	h.jobs[j.id] = j
	return done(returnStarted).Set("Job", wsman.Of(instance("Msvm_ConcreteJob", j.id)))
}

func (h *fakeHost) Invoke(ctx context.Context, ref wsman.Ref, method string, list ...wsman.Argument) (*wsman.Instance, error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	args := map[string]wsman.Value{}
	in := wsman.NewInstance("")
	for _, a := range list {
		args[a.Name] = a.Value
		in.Set(a.Name, a.Value)
	}
	h.calls = append(h.calls, method)
	if h.invoke != nil {
		if out, err := h.invoke(method, args); out != nil || err != nil {
			return out, err
		}
	}
	idOf := func(name string) string {
		r, _ := wsman.Prop[wsman.Ref](in, name)
		return r.Key("InstanceID")
	}
	switch method {
	case "CreateSnapshot":
		kind := typeRecovery
		if n, _ := wsman.Prop[uint16](in, "SnapshotType"); n == snapshotFull {
			kind = typeCheckpoint
		}
		return h.begin(2, func() (wsman.Ref, string) {
			s := &fakeSnapshot{id: fmt.Sprintf("Microsoft:SNAP-%d", h.next()), kind: kind, name: "a name of the host's", file: h.freeze(), seq: int64(len(h.log))}
			h.snapshots = append(h.snapshots, s)
			return instance(classSettings, s.id), ""
		}), nil
	case "ModifySystemSettings":
		text, _ := wsman.Prop[*wsman.Instance](in, "SystemSettings")
		id, _ := wsman.Prop[string](text, "InstanceID")
		for _, s := range h.snapshots {
			if s.id == id {
				s.name, _ = wsman.Prop[string](text, "ElementName")
			}
		}
		return done(0), nil
	case "DestroySnapshot", "ConvertToReferencePoint":
		id := idOf("AffectedSnapshot")
		i := slices.IndexFunc(h.snapshots, func(s *fakeSnapshot) bool { return s.id == id })
		if i < 0 {
			return done(32773), nil
		}
		s := h.snapshots[i]
		return h.begin(1, func() (wsman.Ref, string) {
			h.snapshots = slices.DeleteFunc(h.snapshots, func(o *fakeSnapshot) bool { return o == s })
			os.Remove(filepath.Join(h.dir, s.file))
			if method == "DestroySnapshot" {
				return wsman.Ref{}, ""
			}
			r := &fakeReference{fmt.Sprintf("Microsoft:RP-%d", h.next()), s.seq, h.epoch}
			h.references = append(h.references, r)
			return instance(classReference, r.id), ""
		}), nil
	case "DestroyReferencePoint":
		id := idOf("AffectedReferencePoint")
		h.references = slices.DeleteFunc(h.references, func(r *fakeReference) bool { return r.id == id })
		return done(0), nil
	case "GetVirtualHardDiskSettingData":
		text, _ := wsman.NewInstance("Msvm_VirtualHardDiskSettingData").Set("MaxInternalSize", wsman.Of(uint64(diskSize))).MarshalText()
		return done(0).Set("SettingData", wsman.Of(string(text))), nil
	case "GetVirtualDiskChanges":
		return h.changes(in), nil
	case "GetErrorEx":
		text, _ := wsman.NewInstance("Msvm_Error").Set("Message", wsman.Of("the writers did not answer")).MarshalText()
		return done(0).Set("Errors", wsman.List(string(text))), nil
	}
	h.t.Errorf("a method that the host does not know: %s", method)
	return done(1), nil
}

func (h *fakeHost) changes(in *wsman.Instance) *wsman.Instance {
	file, _ := wsman.Prop[string](in, "Path")
	since, _ := wsman.Prop[string](in, "LimitId")
	off, _ := wsman.Prop[uint64](in, "ByteOffset")
	n, _ := wsman.Prop[uint64](in, "ByteLength")
	var epoch int
	var seq int64
	if _, err := fmt.Sscanf(since, "rct:%d:%d", &epoch, &seq); err != nil || epoch != h.epoch {
		return done(32773)
	}
	var offs, lens []uint64
	for _, s := range h.snapshots {
		if folderVM+s.file != file {
			continue
		}
		for _, w := range h.log {
			first, last := max(uint64(w.off), off), min(uint64(w.off+w.n), off+n)
			if w.seq > seq && w.seq <= s.seq && first < last {
				offs, lens = append(offs, first), append(lens, last-first)
			}
		}
		return done(0).Set("ProcessedByteLength", wsman.Of(n)).Set("ChangedByteOffsets", wsman.List(offs...)).Set("ChangedByteLengths", wsman.List(lens...))
	}
	return done(32779)
}

func (h *fakeHost) Close() error { return nil }

// fakeFiles is the folder of the VM.
type fakeFiles struct{ h *fakeHost }

func (f fakeFiles) local(name string) (string, error) {
	rest, ok := strings.CutPrefix(name, folderVM)
	if !ok || strings.Contains(rest, `\`) {
		return "", fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	return filepath.Join(f.h.dir, rest), nil
}

func (f fakeFiles) open(_ context.Context, name string) (image.File, error) {
	path, err := f.local(name)
	if err != nil {
		return nil, err
	}
	return image.OpenFile(path)
}

func (f fakeFiles) list(context.Context, string) ([]string, error) { return nil, nil }

func (f fakeFiles) size(context.Context, string) (int64, error) {
	f.h.mu.Lock()
	defer f.h.mu.Unlock()
	return f.h.delta, nil
}

func (f fakeFiles) space(context.Context, string) (int64, int64, error) {
	f.h.mu.Lock()
	defer f.h.mu.Unlock()
	return f.h.free, 200 << 30, nil
}

func (f fakeFiles) share(name string) (string, error) {
	if !strings.HasPrefix(name, `C:\`) {
		return "", image.ErrNotAllowed
	}
	return "C$", nil
}

func (f fakeFiles) close() error { return nil }

// Restores are tried against the simulator alone.
func (fakeFiles) create(context.Context, string) (image.Output, error) {
	return nil, fault.ErrUnsupported
}
func (fakeFiles) mkdir(context.Context, string) error          { return fault.ErrUnsupported }
func (fakeFiles) remove(context.Context, string) error         { return fault.ErrUnsupported }
func (fakeFiles) rename(context.Context, string, string) error { return fault.ErrUnsupported }
func (fakeFiles) room(context.Context, string, int64) error    { return fault.ErrUnsupported }
