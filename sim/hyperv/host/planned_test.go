package host_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/host"
)

const management = "Msvm_VirtualSystemManagementService"

// all are the instances of a class that hang on of.
func (b *bench) related(of cim.Ref, association, class string) []*cim.Instance {
	b.Helper()
	q, err := cim.ParseQuery(cim.Virtualization, fmt.Sprintf("ASSOCIATORS OF {%s} WHERE AssocClass=%s ResultClass=%s", of.Path()[strings.IndexByte(of.Path(), ':')+1:], association, class))
	if err != nil {
		b.Fatal(err)
	}
	return q.Run(b.h)
}

func (b *bench) parts(settings cim.Ref, class string) []*cim.Instance {
	b.Helper()
	return b.related(settings, "Msvm_VirtualSystemSettingDataComponent", class)
}

// one is the only one of list.
func one[T any](b *bench, list []T) T {
	b.Helper()
	if len(list) != 1 {
		b.Fatalf("%d, want one: %v", len(list), list)
	}
	return list[0]
}

// messages are a job's errors.
func (b *bench) messages(job *cim.Instance) (text, ids []string) {
	b.Helper()
	m, _ := job.Class.Method("GetErrorEx")
	out, _, err := b.h.Invoke(b.Context(), job, m, nil)
	if err != nil {
		b.Fatal(err)
	}
	for _, e := range out["Errors"].Items {
		i, err := cim.ParseEmbedded(cim.Virtualization, e)
		if err != nil {
			b.Fatal(err)
		}
		text, ids = append(text, i.Get("Message").String()), append(ids, i.Get("MessageID").String())
	}
	return text, ids
}

// copyFile copies a file of the host to another place of it.
func (b *bench) copyFile(from, to string) {
	b.Helper()
	p, err := os.ReadFile(b.h.Local(from))
	if err != nil {
		b.Fatal(err)
	}
	b.putFile(to, p)
}

func (b *bench) putFile(to string, p []byte) {
	b.Helper()
	if err := os.MkdirAll(filepath.Dir(b.h.Local(to)), 0o755); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(b.h.Local(to), p, 0o644); err != nil {
		b.Fatal(err)
	}
}

// keep makes a checkpoint of the VM, copies its definition and disks to folder,
// as a backup does, and gives the definition's path there.
func (b *bench) keep(folder string) string {
	b.Helper()
	cp := b.checkpoint("32768")
	s := b.instance(cp)
	definition := s.Get("ConfigurationDataRoot").String() + `\` + s.Get("ConfigurationFile").String()
	kept := folder + definition[strings.LastIndexByte(definition, '\\'):]
	for _, ext := range []string{".vmcx", ".vmgs"} {
		b.copyFile(strings.TrimSuffix(definition, ".vmcx")+ext, strings.TrimSuffix(kept, ".vmcx")+ext)
	}
	for n, path := range b.files(cp) {
		b.copyFile(path, fmt.Sprintf(`%s\disk%d.vhdx`, folder, n))
	}
	if _, job := b.job("Msvm_VirtualSystemSnapshotService", "DestroySnapshot", args{"AffectedSnapshot": cim.To(cp)}); job.Get("JobState").Uint() != 7 {
		b.Fatal(job.Get("ErrorDescription"))
	}
	return kept
}

func (b *bench) instance(ref cim.Ref) *cim.Instance {
	b.Helper()
	for _, i := range b.h.Instances(ref.Namespace, ref.Class) {
		if i.Ref().Equal(ref) {
			return i
		}
	}
	b.Fatalf("there is no %s", ref.Path())
	return nil
}

func importing(file string, fresh bool) args {
	return args{"SystemDefinitionFile": cim.Text(file), "SnapshotFolder": cim.Text(""), "GenerateNewSystemIdentifier": cim.Bool(fresh)}
}

// imported gives the planned system and its settings.
func (b *bench) imported(file string) (planned, settings cim.Ref) {
	b.Helper()
	made, job := b.job(management, "ImportSystemDefinition", importing(file, true))
	if len(made) != 1 {
		b.Fatal(job.Get("ErrorDescription"))
	}
	return made[0], one(b, b.related(made[0], "Msvm_SettingsDefineState", "Msvm_VirtualSystemSettingData")).Ref()
}

func (b *bench) change(method, parameter string, changed ...*cim.Instance) *cim.Instance {
	b.Helper()
	list := cim.List()
	for _, i := range changed {
		list.Items = append(list.Items, i.Embedded())
	}
	_, job := b.job(management, method, args{parameter: list})
	return job
}

// must fails where a job did not do its work without a word.
func (b *bench) must(job *cim.Instance) {
	b.Helper()
	if job.Get("JobState").Uint() != 7 {
		text, _ := b.messages(job)
		b.Fatalf("%s: state %s: %q", job.Get("Name"), job.Get("JobState"), text)
	}
}

// What a checkpoint's definition says becomes a VM of its own beside the one it
// is of, with other disks, another name and another identity.
func TestADefinitionIsImported(t *testing.T) {
	for _, ide := range []bool{false, true} {
		if testing.Short() && ide {
			continue
		}
		t.Run(fmt.Sprintf("generation 1 %v", ide), func(t *testing.T) {
			b := newBench(t, host.Options{}, host.Spec{IDE: ide, Disks: []host.DiskSpec{{Bytes: 4 * mib}, {Bytes: 4 * mib}}})
			for d := range 2 {
				if err := b.h.Write("web01", d, mib, mib, uint64(d+5)); err != nil {
					t.Fatal(err)
				}
			}
			want := [][]byte{b.expected(0, "", 4*mib), b.expected(1, "", 4*mib)}
			file := b.keep(`C:\Restored`)
			planned, conf := b.imported(file)
			if planned.Class != "Msvm_PlannedComputerSystem" {
				t.Errorf("the job made a %s", planned.Class)
			}
			if got := b.instance(conf).Get("VirtualSystemType").String(); got != "Microsoft:Hyper-V:System:Planned" {
				t.Errorf("its settings are of type %s", got)
			}
			if n := len(b.h.Instances(cim.Virtualization, "Msvm_ComputerSystem")); n != 2 {
				t.Errorf("%d systems while one is planned", n)
			}

			// As it is, its disks are another's.
			validate := func() (text, ids []string, state uint64) {
				_, job := b.job(management, "ValidatePlannedSystem", args{"PlannedSystem": cim.To(planned)})
				text, ids = b.messages(job)
				return text, ids, job.Get("JobState").Uint()
			}
			if text, ids, state := validate(); len(text) != 2 || state != 32768 || ids[0] != "40010" || !strings.Contains(text[0], "0x80070020") {
				t.Errorf("the other's disks: state %d: %q %q", state, ids, text)
			}
			if made, job := b.job(management, "RealizePlannedSystem", args{"PlannedSystem": cim.To(planned)}); len(made) != 0 || job.Get("JobState").Uint() != 10 {
				t.Errorf("realized all the same: %v", made)
			}

			disks := b.parts(conf, "Msvm_StorageAllocationSettingData")
			for n, d := range disks {
				d.Put("HostResource", cim.List(fmt.Sprintf(`C:\Restored\disk%d.vhdx`, n)))
			}
			b.must(b.change("ModifyResourceSettings", "ResourceSettings", disks...))
			s := b.instance(conf)
			s.Put("ElementName", cim.Text("restored")).Put("ConfigurationDataRoot", cim.Text(`C:\Restored`)).Put("SnapshotDataRoot", cim.Text(`C:\Restored`))
			b.must(b.change("ModifySystemSettings", "SystemSettings", s))
			if text, _, state := validate(); state != 7 || len(text) != 0 {
				t.Fatalf("state %d: %q", state, text)
			}
			made, job := b.job(management, "RealizePlannedSystem", args{"PlannedSystem": cim.To(planned)})
			b.must(job)
			vm := one(b, made)
			if vm.Class != "Msvm_ComputerSystem" || vm.Keys["Name"] == b.id || vm.Keys["Name"] != planned.Keys["Name"] {
				t.Errorf("made %s of %s", vm.Path(), planned.Path())
			}
			if n := len(b.h.Instances(cim.Virtualization, "Msvm_PlannedComputerSystem")); n != 0 {
				t.Errorf("%d planned systems are left", n)
			}
			now := b.instance(one(b, b.related(vm, "Msvm_SettingsDefineState", "Msvm_VirtualSystemSettingData")).Ref())
			if now.Get("VirtualSystemType").String() != "Microsoft:Hyper-V:System:Realized" || now.Get("ElementName").String() != "restored" || now.Get("VirtualSystemIdentifier").String() != vm.Keys["Name"] {
				t.Errorf("its settings: %s", now.Embedded())
			}
			for n, path := range b.files(now.Ref()) {
				b.same(path, b.read(path), want[n])
			}
			if guest, err := os.ReadFile(b.h.Local(`C:\Restored\Virtual Machines\` + vm.Keys["Name"] + ".vmgs")); err != nil || !bytes.Contains(guest, []byte("simulated guest state")) {
				t.Errorf("the guest's state: %q %v", guest, err)
			}

			// It runs, writes, and can be backed up in turn.
			b.state(vm, "2", 7)
			if err := b.h.Write("restored", 0, 2*mib, mib, 9); err != nil {
				t.Fatal(err)
			}
			got := make(buffer, 4*mib)
			if err := b.h.Expected("restored", 0, "", got); err != nil {
				t.Fatal(err)
			}
			path := b.files(now.Ref())[0]
			b.same("after a write", b.read(path), got)
			if !bytes.Equal(got[:2*mib], want[0][:2*mib]) {
				t.Error("what it held before is not expected any more")
			}
			b.state(vm, "3", 7)
			_, job = b.job(management, "DestroySystem", args{"AffectedSystem": cim.To(vm)})
			b.must(job)
			if left, _ := filepath.Glob(b.h.Local(`C:\Restored\Virtual Machines`) + "/*"); left != nil {
				t.Errorf("of a VM that is gone there are %v", left)
			}
		})
	}
}

// state asks for a state, whose job must end in want.
func (b *bench) state(vm cim.Ref, state string, want uint64) *cim.Instance {
	b.Helper()
	i := b.instance(vm)
	m, _ := i.Class.Method("RequestStateChange")
	out, code, err := b.h.Invoke(b.Context(), i, m, args{"RequestedState": cim.Text(state)})
	if code != 4096 || err != nil {
		b.Fatal(code, err)
	}
	_, job := b.wait(*out["Job"].Ref)
	if job.Get("JobState").Uint() != want {
		b.Fatalf("state %s: job ended in %s: %s", state, job.Get("JobState"), job.Get("ErrorDescription"))
	}
	return job
}

// A definition that cannot be read, is in use or has an identity that is taken
// is refused, and leaves nothing.
func TestADefinitionThatIsRefused(t *testing.T) {
	b := newBench(t, host.Options{}, host.Spec{Disks: []host.DiskSpec{{Bytes: mib}}})
	file := b.keep(`C:\Restored`)
	good, err := os.ReadFile(b.h.Local(file))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name    string
		content []byte
		want    string
	}{
		{"damaged", bytes.Replace(good, []byte("web01"), []byte("web02"), 1), "damaged"},
		{"cut", good[:len(good)/2], "damaged"},
		{"foreign", []byte("\x01\x00\x00\x00 a real one"), "damaged"},
		{"empty", nil, "damaged"},
		{"missing", nil, "0x80070002"},
	} {
		path := `C:\Restored\` + test.name + ".vmcx"
		if test.name != "missing" {
			b.putFile(path, test.content)
		}
		made, job := b.job(management, "ImportSystemDefinition", importing(path, true))
		if text, _ := b.messages(job); job.Get("JobState").Uint() != 10 || len(made) != 0 || len(text) != 1 || !strings.Contains(text[0], test.want) {
			t.Errorf("%s: state %s, made %v: %q", test.name, job.Get("JobState"), made, text)
		}
	}
	if _, job := b.job(management, "ImportSystemDefinition", importing(file, false)); !strings.Contains(job.Get("ErrorDescription").String(), "same identifier") {
		t.Errorf("an identity that is taken: %s", job.Get("ErrorDescription"))
	}
	if _, code := b.call(management, "ImportSystemDefinition", importing(`C:\VMs\web01\Virtual Machines\`+b.id+".vmcx", true)); code != 32779 {
		t.Errorf("a definition in use: %d", code)
	}
	if _, code := b.call(management, "ImportSystemDefinition", importing(`Restored\a.vmcx`, true)); code != 32773 {
		t.Errorf("no full path: %d", code)
	}
	if n := len(b.h.Instances(cim.Virtualization, "Msvm_PlannedComputerSystem")); n != 0 {
		t.Errorf("%d planned systems are left", n)
	}

	// With the VM gone its identity can be had again.
	b.state(b.vm, "3", 7)
	b.job(management, "DestroySystem", args{"AffectedSystem": cim.To(b.vm)})
	made, _ := b.job(management, "ImportSystemDefinition", importing(file, false))
	if planned := one(b, made); planned.Keys["Name"] != b.id {
		t.Errorf("planned %s", planned.Path())
	}
}

// Validation names each thing that is wrong, and realizing fails of it.
func TestWhatIsWrongWithAPlannedSystem(t *testing.T) {
	b := newBench(t, host.Options{Switches: []string{"LAN", "DMZ"}}, host.Spec{Disks: []host.DiskSpec{{Bytes: mib}}})
	if err := b.h.Write("web01", 0, 0, 4096, 1); err != nil {
		t.Fatal(err)
	}
	file := b.keep(`C:\Restored`)
	child := func(name, parent string) {
		p, err := image.OpenFile(b.h.Local(`C:\Restored\disk0.vhdx`))
		if err != nil {
			t.Fatal(err)
		}
		img, err := vhdx.OpenLayer(p)
		if err != nil {
			t.Fatal(err)
		}
		info := img.Info()
		img.Close()
		w, err := vhdx.Create(b.h.Local(`C:\Restored\`+name), image.CreateOptions{VirtualBytes: mib, BlockBytes: mib, Parent: parent, ParentFormat: image.VHDX, ParentInfo: &info})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Finish(); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	child("child.vhdx", "disk0.vhdx")
	child("orphan.vhdx", "gone.vhdx")
	child("stranger.vhdx", "other.vhdx")
	b.must(func() *cim.Instance {
		_, job := b.job("Msvm_ImageManagementService", "CreateVirtualHardDisk", args{"VirtualDiskSettingData": cim.Text(cim.New(cim.Virtualization, "Msvm_VirtualHardDiskSettingData").
			Put("Path", cim.Text(`C:\Restored\other.vhdx`)).Put("Type", cim.Text("3")).Put("Format", cim.Text("3")).Put("MaxInternalSize", cim.Number(mib)).Embedded())})
		return job
	}())
	b.putFile(`C:\Restored\text.vhdx`, []byte("no disk"))
	b.putFile(`C:\Restored\disk0.raw`, make([]byte, mib))

	planned, conf := b.imported(file)
	disk := one(b, b.parts(conf, "Msvm_StorageAllocationSettingData"))
	port := one(b, b.parts(conf, "Msvm_EthernetPortAllocationSettingData"))
	port.Put("HostResource", cim.List(`root\virtualization\v2:Msvm_VirtualEthernetSwitch.CreationClassName="Msvm_VirtualEthernetSwitch",Name="5E0E7D2C-0000-0000-0000-000000000000"`))
	for _, test := range []struct {
		name, disk, connection string
		want                   []string // of which one is each message's
	}{
		{"all good", `C:\Restored\disk0.vhdx`, "3", nil},
		{"a child of a good parent", `C:\Restored\child.vhdx`, "3", nil},
		{"no such disk", `C:\Restored\gone.vhdx`, "3", []string{"0x80070002"}},
		{"no path", `disk0.vhdx`, "3", []string{"0x8007007B"}},
		{"another's disk", `C:\VMs\web01\Virtual Hard Disks\web01-0.vhdx`, "3", []string{"0x80070020"}},
		{"no disk", `C:\Restored\text.vhdx`, "3", []string{"0x80070570"}},
		{"a raw disk", `C:\Restored\disk0.raw`, "3", []string{"0xC03A0004"}},
		{"a parent that is not there", `C:\Restored\orphan.vhdx`, "3", []string{"0xC03A000D"}},
		{"a parent that is another", `C:\Restored\stranger.vhdx`, "3", []string{"0xC03A000E"}},
		{"no such switch", `C:\Restored\disk0.vhdx`, "2", []string{"Could not find Ethernet switch 'LAN'"}},
		{"both", `C:\Restored\gone.vhdx`, "2", []string{"0x80070002", "Could not find Ethernet switch 'LAN'"}},
	} {
		disk.Put("HostResource", cim.List(test.disk))
		port.Put("EnabledState", cim.Text(test.connection))
		b.must(b.change("ModifyResourceSettings", "ResourceSettings", disk, port))
		_, job := b.job(management, "ValidatePlannedSystem", args{"PlannedSystem": cim.To(planned)})
		text, _ := b.messages(job)
		if len(text) != len(test.want) || (job.Get("JobState").Uint() == 7) != (test.want == nil) {
			t.Errorf("%s: state %s: %q", test.name, job.Get("JobState"), text)
			continue
		}
		for _, w := range test.want {
			if !slices.ContainsFunc(text, func(s string) bool { return strings.Contains(s, w) }) {
				t.Errorf("%s: %q does not say %s", test.name, text, w)
			}
		}
		if test.want == nil {
			continue
		}
		_, job = b.job(management, "RealizePlannedSystem", args{"PlannedSystem": cim.To(planned)})
		if text, _ := b.messages(job); job.Get("JobState").Uint() != 10 || len(text) != len(test.want) {
			t.Errorf("%s: realizing ended in %s: %q", test.name, job.Get("JobState"), text)
		}
	}
	if _, job := b.job(management, "DestroySystem", args{"AffectedSystem": cim.To(planned)}); job.Get("JobState").Uint() != 7 {
		t.Error(job.Get("ErrorDescription"))
	}
	if !fileThere(b, file) {
		t.Error("what was imported went with the planned system")
	}
	for _, method := range []string{"ValidatePlannedSystem", "RealizePlannedSystem"} {
		if _, code := b.call(management, method, args{"PlannedSystem": cim.To(planned)}); code != 32773 {
			t.Errorf("%s of a planned system that is gone: %d", method, code)
		}
	}
}

func fileThere(b *bench, path string) bool {
	_, err := os.Stat(b.h.Local(path))
	return err == nil
}

// A definition that is based on a checkpoint says so: it is looked for, and
// without it nothing is realized.
func TestCheckpointsOfAPlannedSystem(t *testing.T) {
	b := newBench(t, host.Options{}, host.Spec{Disks: []host.DiskSpec{{Bytes: mib}}})
	user := b.checkpoint("2")
	file := b.keep(`C:\Restored`)
	planned, _ := b.imported(file)
	kept := func() *cim.Instance {
		return one(b, b.related(planned, "Msvm_SnapshotOfVirtualSystem", "Msvm_VirtualSystemSettingData"))
	}
	if got := kept().Get("VirtualSystemType").String(); got != "Microsoft:Hyper-V:Snapshot:Missing" {
		t.Errorf("the checkpoint is %s", got)
	}
	_, job := b.job(management, "ValidatePlannedSystem", args{"PlannedSystem": cim.To(planned)})
	id := strings.TrimPrefix(user.Keys["InstanceID"], "Microsoft:")
	if text, _ := b.messages(job); !strings.Contains(strings.Join(text, "\n"), id) {
		t.Errorf("%q does not name %s", text, id)
	}
	made, job := b.job(management, "ImportSnapshotDefinitions", args{"PlannedSystem": cim.To(planned), "SnapshotFolder": cim.Text(`C:\VMs\web01\Snapshots`)})
	b.must(job)
	if !one(b, made).Equal(kept().Ref()) || kept().Get("VirtualSystemType").String() != "Microsoft:Hyper-V:Snapshot:Planned" {
		t.Errorf("made %v, it is %s", made, kept().Embedded())
	}
	_, job = b.job("Msvm_VirtualSystemSnapshotService", "DestroySnapshot", args{"AffectedSnapshot": cim.To(kept().Ref())})
	b.must(job)
	if left := b.related(planned, "Msvm_SnapshotOfVirtualSystem", "Msvm_VirtualSystemSettingData"); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	_, job = b.job(management, "ValidatePlannedSystem", args{"PlannedSystem": cim.To(planned)})
	if text, _ := b.messages(job); strings.Contains(strings.Join(text, "\n"), "checkpoint") {
		t.Errorf("%q", text)
	}
	if n := len(b.related(b.vm, "Msvm_SnapshotOfVirtualSystem", "Msvm_VirtualSystemSettingData")); n != 1 {
		t.Errorf("the VM that was kept has %d checkpoints", n)
	}
}

// Whatever a definition file says, it is read or refused.
func FuzzDefinition(f *testing.F) {
	h, err := host.New(host.Options{Dir: f.TempDir()})
	if err != nil {
		f.Fatal(err)
	}
	id, err := h.AddVM(host.Spec{Name: "web01", IDE: true})
	if err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(h.Local(`C:\VMs\web01\Virtual Machines\` + id + ".vmcx"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("simulated Hyper-V configuration 2\n\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		// With the sum mended, the parser behind it is reached, too.
		for _, content := range [][]byte{p, host.MendDefinition(p)} {
			if kept, err := host.ReadDefinition(content); err == nil {
				again, err := host.ReadDefinition(kept)
				if err != nil || !bytes.Equal(again, kept) {
					t.Errorf("what was read cannot be read again: %v\n%s\n%s", err, kept, again)
				}
			}
		}
	})
}
