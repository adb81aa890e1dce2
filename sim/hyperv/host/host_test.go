package host_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhd"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/host"
)

const mib = 1 << 20

// A bench is a host with one VM, and what a client does with it.
type bench struct {
	*testing.T
	h  *host.Host
	vm cim.Ref
	id string
}

func newBench(t *testing.T, o host.Options, s host.Spec) *bench {
	t.Helper()
	o.Dir = t.TempDir()
	if o.JobTime == 0 {
		o.JobTime = time.Millisecond
	}
	h, err := host.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	s.Name = "web01"
	id, err := h.AddVM(s)
	if err != nil {
		t.Fatal(err)
	}
	return &bench{T: t, h: h, id: id, vm: cim.Ref{Namespace: cim.Virtualization, Class: "Msvm_ComputerSystem", Keys: map[string]string{"CreationClassName": "Msvm_ComputerSystem", "Name": id}}}
}

type args = map[string]cim.Value

func (b *bench) call(class, method string, a args) (args, uint32) {
	b.Helper()
	all := b.h.Instances(cim.Virtualization, class)
	if len(all) != 1 {
		b.Fatalf("%d instances of %s", len(all), class)
	}
	m, ok := all[0].Class.Method(method)
	if !ok {
		b.Fatalf("%s has no %s", class, method)
	}
	out, code, err := b.h.Invoke(b.Context(), all[0], m, a)
	if err != nil {
		b.Fatal(err)
	}
	return out, code
}

// job waits for what a call began, and gives the elements that it created.
func (b *bench) job(class, method string, a args) ([]cim.Ref, *cim.Instance) {
	b.Helper()
	out, code := b.call(class, method, a)
	if code != 4096 || len(out) != 1 {
		b.Fatalf("%s: %d %v", method, code, out)
	}
	return b.wait(*out["Job"].Ref)
}

func (b *bench) wait(ref cim.Ref) ([]cim.Ref, *cim.Instance) {
	b.Helper()
	created := func() (made []cim.Ref) {
		for _, row := range b.h.Instances(cim.Virtualization, "Msvm_AffectedJobElement") {
			if row.Get("AffectingElement").Ref.Equal(ref) && row.Get("ElementEffects").String() == "5" {
				made = append(made, *row.Get("AffectedElement").Ref)
			}
		}
		return made
	}
	for {
		before := created()
		for _, job := range b.h.Instances(cim.Virtualization, ref.Class) {
			switch {
			case !job.Ref().Equal(ref):
			case job.Get("JobState").Uint() >= 7:
				return created(), job
			case before != nil:
				b.Fatal("a job that still runs had told what it made")
			}
		}
		time.Sleep(time.Millisecond)
	}
}

func (b *bench) checkpoint(kind string) cim.Ref {
	b.Helper()
	made, job := b.job("Msvm_VirtualSystemSnapshotService", "CreateSnapshot", args{"AffectedSystem": cim.To(b.vm), "SnapshotType": cim.Text(kind),
		"SnapshotSettings": cim.Text(cim.New(cim.Virtualization, "Msvm_VirtualSystemSnapshotSettingData").Put("ConsistencyLevel", cim.Text("1")).Embedded())})
	if len(made) != 1 {
		b.Fatalf("no checkpoint: %s", job.Get("ErrorDescription"))
	}
	return made[0]
}

// files are the paths that settings name, by the last parts of their ids.
func (b *bench) files(settings cim.Ref) (paths []string) {
	b.Helper()
	q, err := cim.ParseQuery(cim.Virtualization, `ASSOCIATORS OF {`+settings.Path()[strings.IndexByte(settings.Path(), ':')+1:]+`} WHERE AssocClass=Msvm_VirtualSystemSettingDataComponent ResultClass=Msvm_StorageAllocationSettingData`)
	if err != nil {
		b.Fatal(err)
	}
	for _, i := range q.Run(b.h) {
		paths = append(paths, i.Get("HostResource").String())
	}
	return paths
}

// read is all that a file shows, through its parents.
func (b *bench) read(path string) []byte {
	b.Helper()
	local := b.h.Local(path)
	var open func(local string) (image.Image, error)
	open = func(local string) (image.Image, error) {
		f, err := image.OpenFile(local)
		if err != nil {
			return nil, err
		}
		parent := func(name string, _ image.Format) (image.Image, error) {
			return open(filepath.Join(filepath.Dir(local), name[strings.LastIndexAny(name, `\/`)+1:]))
		}
		if strings.HasSuffix(local, "vhd") {
			return vhd.Open(f, parent)
		}
		return vhdx.Open(f, parent)
	}
	img, err := open(local)
	if err != nil {
		b.Fatal(err)
	}
	defer img.Close()
	p := make([]byte, img.Size())
	if _, err := img.ReadAt(p, 0); err != nil && err != io.EOF {
		b.Fatal(err)
	}
	return p
}

type buffer []byte

func (b buffer) WriteAt(p []byte, off int64) (int, error) { return copy(b[off:], p), nil }

func (b *bench) expected(disk int, moment string, bytes int) []byte {
	b.Helper()
	p := make(buffer, bytes)
	if err := b.h.Expected("web01", disk, moment, p); err != nil {
		b.Fatal(err)
	}
	return p
}

func (b *bench) same(what string, got, want []byte) {
	b.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		b.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range want {
		if got[i] != want[i] {
			b.Fatalf("%s: byte %d is %#x, want %#x", what, i, got[i], want[i])
		}
	}
}

func (b *bench) points() []*cim.Instance {
	return b.h.Instances(cim.Virtualization, "Msvm_VirtualSystemReferencePoint")
}

// While the guest writes on, a checkpoint's files stand still and hold what
// the disks held; the changes since the reference point before are all that
// differs; and when everything is merged, the disks hold what was written.
func TestACheckpointStandsStillAndChangesAreComplete(t *testing.T) {
	for _, granule := range []int64{64 << 10, 4 << 10} {
		if testing.Short() && granule != 64<<10 {
			continue
		}
		t.Run(fmt.Sprint(granule), func(t *testing.T) {
			const size = 12 * mib
			b := newBench(t, host.Options{Granule: granule}, host.Spec{Disks: []host.DiskSpec{{Bytes: size}, {Bytes: 3 * mib, Fixed: true, SectorBytes: 4096}}})
			sizes := []int{size, 3 * mib}
			for d, n := range sizes {
				if err := b.h.Write("web01", d, int64(n)/2, int64(n)/4, 7); err != nil {
					t.Fatal(err)
				}
			}
			ctx, stop := context.WithCancel(t.Context())
			guest := make(chan error, 1)
			go func() { guest <- b.h.Guest(ctx, "web01", 50, 42) }()
			var before *cim.Instance
			for round := range 3 {
				time.Sleep(60 * time.Millisecond)
				cp := b.checkpoint("32768")
				moment := cp.Keys["InstanceID"]
				paths := b.files(cp)
				if len(paths) != 2 {
					t.Fatal(paths)
				}
				for d, path := range paths {
					want := b.expected(d, moment, sizes[d])
					b.same(path, b.read(path), want)
					if before == nil {
						continue
					}
					out, code := b.call("Msvm_ImageManagementService", "GetVirtualDiskChanges", args{"Path": cim.Text(path), "LimitId": cim.Text(before.Get("ResilientChangeTrackingIdentifiers").Items[d]),
						"ByteOffset": cim.Text("0"), "ByteLength": cim.Number(sizes[d])})
					if code != 0 || int(out["ProcessedByteLength"].Uint()) != sizes[d] {
						t.Fatal(code, out)
					}
					old := b.expected(d, before.Get("InstanceID").String(), sizes[d])
					changed := 0
					for i := range out["ChangedByteOffsets"].Items {
						off, n := cim.Text(out["ChangedByteOffsets"].Items[i]).Uint(), cim.Text(out["ChangedByteLengths"].Items[i]).Uint()
						if off%uint64(granule) != 0 {
							t.Errorf("a change at %d", off)
						}
						copy(old[off:off+n], want[off:])
						changed += int(n)
					}
					b.same("the older content with the changes", old, want)
					if d == 0 && changed == sizes[d] {
						t.Error("everything changed")
					}
				}
				made, job := b.job("Msvm_VirtualSystemSnapshotService", "ConvertToReferencePoint", args{"AffectedSnapshot": cim.To(cp)})
				if len(made) != 1 {
					t.Fatal(job.Get("ErrorDescription"))
				}
				if before != nil {
					b.job("Msvm_VirtualSystemReferencePointService", "DestroyReferencePoint", args{"AffectedReferencePoint": cim.To(before.Ref())})
				}
				if points := b.points(); len(points) != 1 || !points[0].Ref().Equal(made[0]) {
					t.Fatalf("round %d: %d reference points", round, len(points))
				}
				before = b.points()[0]
			}
			stop()
			if err := <-guest; err != nil {
				t.Fatal(err)
			}
			for d, path := range b.files(cim.Ref{Namespace: cim.Virtualization, Class: "Msvm_VirtualSystemSettingData", Keys: map[string]string{"InstanceID": "Microsoft:" + b.id}}) {
				if strings.HasSuffix(path, ".avhdx") {
					t.Errorf("%s was not merged", path)
				}
				b.same(path, b.read(path), b.expected(d, "", sizes[d]))
			}
			if left, _ := filepath.Glob(filepath.Join(b.h.Local(`C:\VMs\web01\Virtual Hard Disks`), "*.avhdx")); left != nil {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// In a chain of checkpoints, taking away any of them leaves the others as they
// were.
func TestAnyCheckpointOfAChainMayGo(t *testing.T) {
	const size = 8 * mib
	for gone := range 3 {
		if testing.Short() && gone != 1 {
			continue
		}
		b := newBench(t, host.Options{}, host.Spec{Disks: []host.DiskSpec{{Bytes: size}}})
		var chain []cim.Ref
		for n := range 3 {
			if err := b.h.Write("web01", 0, int64(n)*mib, 3*mib, uint64(n+1)); err != nil {
				t.Fatal(err)
			}
			if err := b.h.Write("web01", 0, int64(n)*mib, 4096, 0); err != nil {
				t.Fatal(err)
			}
			chain = append(chain, b.checkpoint([]string{"2", "32768", "2"}[n]))
		}
		if err := b.h.Write("web01", 0, 5*mib, mib, 9); err != nil {
			t.Fatal(err)
		}
		if _, job := b.job("Msvm_VirtualSystemSnapshotService", "DestroySnapshot", args{"AffectedSnapshot": cim.To(chain[gone])}); job.Get("JobState").Uint() != 7 {
			t.Fatal(job.Get("ErrorDescription"))
		}
		for n, cp := range chain {
			if n != gone {
				b.same(fmt.Sprintf("without %d, checkpoint %d", gone, n), b.read(b.files(cp)[0]), b.expected(0, cp.Keys["InstanceID"], size))
			}
		}
		b.same("now", b.read(b.files(settings(b.id))[0]), b.expected(0, "", size))
		_, code := b.call("Msvm_VirtualSystemSnapshotService", "DestroySnapshot", args{"AffectedSnapshot": cim.To(chain[gone])})
		if code != 32773 {
			t.Errorf("again: %d", code)
		}
	}
}

func settings(id string) cim.Ref {
	return cim.Ref{Namespace: cim.Virtualization, Class: "Msvm_VirtualSystemSettingData", Keys: map[string]string{"InstanceID": "Microsoft:" + id}}
}

func TestOneJobAtATime(t *testing.T) {
	for jobTime := 300 * time.Millisecond; ; jobTime *= 8 {
		b := newBench(t, host.Options{JobTime: jobTime}, host.Spec{Disks: []host.DiskSpec{{Bytes: mib}}})
		began := time.Now()
		out, code := b.call("Msvm_VirtualSystemSnapshotService", "CreateSnapshot", args{"AffectedSystem": cim.To(b.vm), "SnapshotType": cim.Text("32768")})
		if code != 4096 || out["ResultingSnapshot"].Set {
			t.Fatal(code, out)
		}
		_, code = b.call("Msvm_VirtualSystemSnapshotService", "CreateSnapshot", args{"AffectedSystem": cim.To(b.vm), "SnapshotType": cim.Text("32768")})
		late := time.Since(began) >= jobTime // a busy machine; the job may be over
		b.wait(*out["Job"].Ref)
		if code == 32775 {
			return
		}
		if !late {
			t.Fatalf("a second beside the first: %d", code)
		}
	}
}

// What goes wrong on a host, goes wrong here when it is told to.
func TestTrouble(t *testing.T) {
	start := func(t *testing.T, s host.Spec) *bench {
		s.Disks = []host.DiskSpec{{Bytes: mib}, {Bytes: mib}}
		return newBench(t, host.Options{}, s)
	}
	create := func(b *bench, level, typ string) args {
		return args{"AffectedSystem": cim.To(b.vm), "SnapshotType": cim.Text("32768"), "SnapshotSettings": cim.Text(`<INSTANCE CLASSNAME="Msvm_VirtualSystemSnapshotSettingData"><PROPERTY NAME="ConsistencyLevel" TYPE="` + typ + `"><VALUE>` + level + `</VALUE></PROPERTY></INSTANCE>`)}
	}
	const service = "Msvm_VirtualSystemSnapshotService"
	t.Run("a job's exception has an Msvm_Error", func(t *testing.T) {
		b := start(t, host.Spec{})
		b.h.SetTrouble(func(x *host.Trouble) { x.FailJob = map[string]string{"CreateSnapshot": "VSS writer failed"} })
		_, job := b.job(service, "CreateSnapshot", create(b, "1", "uint8"))
		if job.Get("JobState").Uint() != 10 || job.Get("ErrorCode").Uint() == 0 {
			t.Errorf("%v", job)
		}
		m, _ := job.Class.Method("GetErrorEx")
		out, _, err := b.h.Invoke(t.Context(), job, m, nil)
		if err != nil || !bytes.Contains([]byte(out["Errors"].String()), []byte("VSS writer failed")) {
			t.Error(out, err)
		}
	})
	t.Run("no backup service in the guest", func(t *testing.T) {
		b := start(t, host.Spec{NoVSS: true})
		if _, job := b.job(service, "CreateSnapshot", create(b, "1", "uint8")); job.Get("JobState").Uint() != 10 {
			t.Error("application consistency without it")
		}
		if _, job := b.job(service, "CreateSnapshot", create(b, "2", "uint8")); job.Get("JobState").Uint() != 7 {
			t.Error(job.Get("ErrorDescription"))
		}
	})
	t.Run("a wrong TYPE", func(t *testing.T) {
		b := start(t, host.Spec{})
		if _, code := b.call(service, "CreateSnapshot", create(b, "1", "uint16")); code != 32768 {
			t.Error(code)
		}
	})
	t.Run("arrays of different length", func(t *testing.T) {
		b := start(t, host.Spec{})
		b.h.SetTrouble(func(x *host.Trouble) { x.UnequalArrays = true })
		b.job(service, "ConvertToReferencePoint", args{"AffectedSnapshot": cim.To(b.checkpoint("32768"))})
		p := b.points()[0]
		if d, r := len(p.Get("VirtualDiskIdentifiers").Items), len(p.Get("ResilientChangeTrackingIdentifiers").Items); d != 2 || r != 1 {
			t.Error(d, r)
		}
	})
	t.Run("an unknown id, short answers, no progress", func(t *testing.T) {
		b := start(t, host.Spec{})
		b.job(service, "ConvertToReferencePoint", args{"AffectedSnapshot": cim.To(b.checkpoint("32768"))})
		id := b.points()[0].Get("ResilientChangeTrackingIdentifiers").String()
		path := b.files(b.checkpoint("32768"))[0]
		ask := func(path, id string) (uint64, uint32) {
			out, code := b.call("Msvm_ImageManagementService", "GetVirtualDiskChanges", args{"Path": cim.Text(path), "LimitId": cim.Text(id), "ByteOffset": cim.Text("0"), "ByteLength": cim.Number(mib)})
			return out["ProcessedByteLength"].Uint(), code
		}
		check := func(what string, n, wantN uint64, code, wantCode uint32) {
			if n != wantN || code != wantCode {
				t.Errorf("%s: %d bytes, code %d", what, n, code)
			}
		}
		n, code := ask(path, "x")
		check("an unknown id", n, 0, code, 32773)
		n, code = ask(path+"x", id)
		check("an unknown file", n, 0, code, 32779)
		b.h.SetTrouble(func(x *host.Trouble) { x.ShortAnswers = 128 << 10 })
		n, code = ask(path, id)
		check("short", n, 128<<10, code, 0)
		b.h.SetTrouble(func(x *host.Trouble) { *x = host.Trouble{EmptyProgress: true} })
		n, code = ask(path, id)
		check("no progress", n, 0, code, 0)
		b.h.LoseTracking()
		n, code = ask(path, id)
		check("tracking lost", n, 0, code, 32773)
	})
	t.Run("a configuration too old for tracking", func(t *testing.T) {
		b := start(t, host.Spec{Version: "5.0"})
		b.job(service, "ConvertToReferencePoint", args{"AffectedSnapshot": cim.To(b.checkpoint("32768"))})
		if ids := b.points()[0].Get("ResilientChangeTrackingIdentifiers").Items; len(ids) != 0 {
			t.Error(ids)
		}
	})
}

// A VM is defined, gets a controller, a drive and a disk by their paths, runs,
// and goes.
func TestAVMIsMade(t *testing.T) {
	b := newBench(t, host.Options{}, host.Spec{})
	const service = "Msvm_VirtualSystemManagementService"
	embedded := func(class string, pairs ...string) cim.Value {
		i := cim.New(cim.Virtualization, class)
		for n := 0; n < len(pairs); n += 2 {
			i.Put(pairs[n], cim.List(pairs[n+1]))
		}
		return cim.Text(i.Embedded())
	}
	made, job := b.job(service, "DefineSystem", args{"SystemSettings": embedded("Msvm_VirtualSystemSettingData", "ElementName", "restored", "VirtualSystemSubType", "Microsoft:Hyper-V:SubType:2")})
	if len(made) != 1 {
		t.Fatal(job.Get("ErrorDescription"))
	}
	vm := made[0]
	conf := cim.To(settings(vm.Keys["Name"]))
	disk := embedded("Msvm_VirtualHardDiskSettingData", "Path", `C:\VMs\restored\a.vhdx`, "Type", "3", "Format", "3", "MaxInternalSize", fmt.Sprint(mib))
	if _, job := b.job("Msvm_ImageManagementService", "CreateVirtualHardDisk", args{"VirtualDiskSettingData": disk}); job.Get("JobState").Uint() != 7 || job.Class.Name != "Msvm_StorageJob" {
		t.Fatal(job.Get("ErrorDescription"))
	}
	add := func(settings cim.Value) cim.Ref {
		t.Helper()
		made, job := b.job(service, "AddResourceSettings", args{"AffectedConfiguration": conf, "ResourceSettings": settings})
		if len(made) != 1 {
			t.Fatal(job.Get("ErrorDescription"))
		}
		return made[0]
	}
	scsi := add(embedded("Msvm_ResourceAllocationSettingData", "ResourceType", "6", "ResourceSubType", "Microsoft:Hyper-V:Synthetic SCSI Controller"))
	drive := add(embedded("Msvm_ResourceAllocationSettingData", "ResourceType", "17", "ResourceSubType", "Microsoft:Hyper-V:Synthetic Disk Drive", "Parent", scsi.Path(), "AddressOnParent", "3"))
	add(embedded("Msvm_StorageAllocationSettingData", "ResourceType", "31", "ResourceSubType", "Microsoft:Hyper-V:Virtual Hard Disk", "Parent", `\\HV01\`+drive.Path(), "HostResource", `C:\VMs\restored\a.vhdx`))
	if files := b.files(*conf.Ref); len(files) != 1 || files[0] != `C:\VMs\restored\a.vhdx` {
		t.Error(files)
	}
	if _, code := b.call(service, "AddResourceSettings", args{"AffectedConfiguration": conf, "ResourceSettings": embedded("Msvm_ResourceAllocationSettingData", "ResourceType", "17", "Parent", "no path")}); code != 32773 {
		t.Errorf("a parent that is no path: %d", code)
	}
	for _, i := range b.h.Instances(cim.Virtualization, "Msvm_ComputerSystem") {
		if i.Ref().Equal(vm) {
			m, _ := i.Class.Method("RequestStateChange")
			for _, state := range []string{"2", "3"} {
				out, code, err := b.h.Invoke(t.Context(), i, m, args{"RequestedState": cim.Text(state)})
				if code != 4096 || err != nil {
					t.Fatal(code, err)
				}
				b.wait(*out["Job"].Ref)
				if state == "2" {
					if _, code := b.call(service, "DestroySystem", args{"AffectedSystem": cim.To(vm)}); code != 32775 {
						t.Errorf("a VM that runs is destroyed: %d", code)
					}
				}
			}
		}
	}
	b.job(service, "DestroySystem", args{"AffectedSystem": cim.To(vm)})
	if n := len(b.h.Instances(cim.Virtualization, "Msvm_ComputerSystem")); n != 2 {
		t.Errorf("%d systems are left", n)
	}
	b.read(`C:\VMs\restored\a.vhdx`) // the disk stays
}
