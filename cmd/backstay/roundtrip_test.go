//go:build linux && amd64

package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/lab"
	"github.com/backstay/backstay/internal/smb/smbtest"
	"github.com/backstay/backstay/internal/vm"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// What the guests' disks begin with; the guests themselves judge it.
const (
	systemBytes = 96 << 20
	dataBytes   = 24 << 20
	fillBytes   = 2<<20 + 17
)

// A journey has a guest go from one hypervisor to the other: a real libvirt,
// and a Hyper-V host that is simulated but for its shares, which a real Samba
// serves. All that moves it is what people would type.
type journey struct {
	*testing.T
	ctx   context.Context
	lab   *lab.Libvirt
	guest *lab.Guest
	hv    *host.Host
	at    string // of the Hyper-V host, "USER@HOST:PORT"
	query string
	env   []string
}

// newJourney skips where there is no libvirt, unless it must not.
func newJourney(t *testing.T) *journey {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "not root"
	}
	for _, p := range []string{"go", "libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "qemu-nbd", "apt-get", "/sbin/mke2fs"} {
		if _, err := exec.LookPath(p); err != nil {
			why = err.Error()
		}
	}
	if why == "" && !hasSamba() {
		why = "no Samba"
	}
	switch {
	case testing.Short():
		t.Skip("boots a guest")
	case why == "":
	case os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1":
		t.Fatal("this test may not be skipped here: ", why)
	default:
		t.Skip(why)
	}
	// Emulated guests on a busy machine, and other labs that have to end first.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	t.Cleanup(cancel)
	j := &journey{T: t, ctx: ctx}
	var err error
	j.guest, err = lab.Build(ctx, "", lab.BuildOptions{Log: t.Logf})
	j.ok(err)
	dir, err := os.MkdirTemp("", "bstrip") // short, for its sockets
	j.ok(err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	j.lab, err = lab.StartLibvirt(ctx, dir, lab.LibvirtOptions{Log: t.Logf})
	j.ok(err)
	t.Cleanup(func() {
		if err := j.lab.Stop(); err != nil {
			t.Error(err)
		}
	})
	files := imagetest.MemoryDir(t)
	samba := smbtest.Run(t, smbtest.Options{Dir: filepath.Join(files, "C")})
	j.ok(os.MkdirAll(filepath.Join(files, "C", "VMs"), 0o755))
	j.hv, err = host.New(host.Options{Dir: files, JobTime: time.Millisecond})
	j.ok(err)
	t.Cleanup(func() { j.hv.Close() })
	e, err := sim.Serve(j.hv, "HV01", sim.Options{User: smbtest.User, Password: smbtest.Password})
	j.ok(err)
	t.Cleanup(func() { e.Close() })
	u, err := url.Parse(e.URL)
	j.ok(err)
	j.at = smbtest.User + "@" + u.Host
	j.query = fmt.Sprintf(`smb=%s&share=C:\=%s&fingerprint=sha256:%s`, samba.Addr(), smbtest.Share, e.Fingerprint)
	home := imagetest.MemoryDir(t)
	j.env = append(os.Environ(), "HOME="+home, "BACKSTAY_REPO="+filepath.Join(home, "repo"), "BACKSTAY_PASSWORD=correct horse", "BACKSTAY_HOST_PASSWORD="+smbtest.Password)
	j.run("0", "repo", "init")
	return j
}

func (j *journey) ok(err error) {
	j.Helper()
	if err != nil {
		j.Fatal(err)
	}
}

// hyperv is the URL of a VM there, as the command line takes it.
func (j *journey) hyperv(name string) string { return "hyperv://" + j.at + "/" + name + "?" + j.query }

// run runs backstay, wants one of these exit codes ("0 or 4"), and gives what
// it said.
func (j *journey) run(codes string, args ...string) string {
	j.Helper()
	cmd := exec.CommandContext(j.ctx, "backstay", args...)
	cmd.Env = j.env
	out, err := cmd.CombinedOutput()
	got := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		j.Fatal(err)
	}
	j.Logf("backstay %s: %d\n%s", strings.Join(args, " "), got, out)
	if !slices.Contains(strings.Fields(codes), fmt.Sprint(got)) {
		j.Fatalf("exit code %d, want %s", got, codes)
	}
	return string(out)
}

// says looks for words in what a command said.
func (j *journey) says(text string, words ...string) {
	j.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			j.Errorf("it does not say %q", w)
		}
	}
}

// disks makes the system disk and the data disk of a guest as raw images.
func (j *journey) disks(name string) (system, data string) {
	j.Helper()
	system, data = j.lab.Path(name+"-system.raw"), j.lab.Path(name+"-data.raw")
	j.ok(j.guest.CreateDisk(j.ctx, system, lab.DiskOptions{SizeBytes: systemBytes, Bootable: true, FillBytes: fillBytes, Seed: 1}))
	j.ok(j.guest.CreateDisk(j.ctx, data, lab.DiskOptions{SizeBytes: dataBytes, Label: lab.DataLabel, FillBytes: fillBytes, Seed: 2}))
	return system, data
}

// described restores the disks and the description of a restore point to a
// directory.
func (j *journey) described(point string) (dir string, def vm.Definition) {
	j.Helper()
	dir = filepath.Join(imagetest.MemoryDir(j.T), "point")
	j.run("0", "restore", point, "--to", dir+"/", "--format", "raw")
	if text, err := os.ReadFile(filepath.Join(dir, "vm.json")); err == nil {
		j.ok(json.Unmarshal(text, &def))
	}
	return dir, def
}

// same compares two raw images bit by bit.
func (j *journey) same(a, b string) {
	j.Helper()
	x, err := os.Open(a)
	j.ok(err)
	defer x.Close()
	y, err := os.Open(b)
	j.ok(err)
	defer y.Close()
	p, q := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := 0; ; off += len(p) {
		n, errX := io.ReadFull(x, p)
		m, errY := io.ReadFull(y, q)
		if !bytes.Equal(p[:n], q[:m]) {
			j.Fatalf("%s and %s differ after byte %d", a, b, off)
		}
		if errX != nil || errY != nil {
			return
		}
	}
}

// wakes waits for a guest that was started, has it judge its disks, and gives
// its definition.
func (j *journey) wakes(name string) (v *lab.VM, definition string) {
	j.Helper()
	v = j.lab.VM(name)
	began := time.Now()
	if err := v.WaitAgent(j.ctx); err != nil {
		text, _ := v.DomainXML(context.Background())
		j.Fatalf("%v\n%s", err, text)
	}
	j.Logf("the agent of %s answers after %v", name, time.Since(began).Round(100*time.Millisecond))
	said, err := v.Verify(j.ctx)
	j.ok(err)
	if !strings.HasPrefix(said, "WORKLOAD VERIFY OK") {
		j.Errorf("the guest says of its records: %s", said)
	}
	for _, dir := range []string{"/data/fill", "/data2/fill"} {
		said, err := v.AgentExec(j.ctx, "/bin/workload", "check", "-dir", dir)
		if want := fmt.Sprintf("WORKLOAD CHECK OK bytes %d\n", fillBytes); err != nil || said != want {
			j.Errorf("the guest says of %s: %q, %v", dir, said, err)
		}
	}
	definition, err = v.DomainXML(j.ctx)
	j.ok(err)
	return v, definition
}

// in is the same journey for a part of the test, which may have to be left to
// another day.
func (j *journey) in(t *testing.T, soak bool) *journey {
	t.Helper()
	if soak && os.Getenv("BACKSTAY_SOAK") == "" {
		t.Skip("boots further guests, some 15 s each: BACKSTAY_SOAK=1, make soak")
	}
	part := *j
	part.T = t
	return &part
}

// bareLinux is what the simulated host is told of a guest that it does not run.
func bareLinux(g *host.Guest) {
	*g = host.Guest{OS: "Debian GNU/Linux", Version: "6.1.0", Integration: "3.1"}
}

// A guest goes from one hypervisor to another and boots there: what is made of
// its definition on the way is what it needs, and its disks are whole.
func TestGuestsChangeTheirHypervisor(t *testing.T) {
	j := newJourney(t)
	for _, c := range []trip{
		{name: "a BIOS, shut off",
			there: []string{"the network card is not connected"}, back: []string{"its disks are on ide (as generation 1 had them)", "cards: 1, as e1000e"},
			devices: []string{"machine='pc-i440fx", "dev='hda' bus='ide'", "dev='hdb' bus='ide'", "<link state='down'/>"}},
		{name: "a BIOS, running", running: true, soak: true,
			back: []string{"its disks are on ide"}, devices: []string{"dev='hda' bus='ide'", "dev='hdb' bus='ide'"}},
		{name: "UEFI, running", uefi: true, running: true, soak: true,
			there: []string{"Secure Boot is off", "BOOTX64.EFI"}, back: []string{"its disks are on scsi (by virtio, which Linux knows)", "BOOTX64.EFI"},
			devices: []string{"machine='pc-q35", "OVMF", "dev='sda' bus='scsi'", "dev='sdb' bus='scsi'", "model='virtio-scsi'"}},
		{name: "UEFI, shut off, on the bus that was asked for", uefi: true, bus: "virtio", soak: true,
			back: []string{"its disks are on virtio (as asked for)"}, devices: []string{"machine='pc-q35", "OVMF", "dev='vda' bus='virtio'", "dev='vdb' bus='virtio'"}},
	} {
		t.Run("from KVM to Hyper-V and back: "+c.name, func(t *testing.T) { c.travel(j.in(t, c.soak)) })
	}
	for _, c := range []struct {
		name     string
		ide      bool
		code     int
		restored []string
		devices  []string
	}{
		{"generation 1", true, 0, []string{"its disks are on ide (as generation 1 had them)", "(before: LAN)"}, []string{"machine='pc-i440fx", "dev='hda' bus='ide'", "dev='hdb' bus='ide'"}},
		{"generation 2", false, 4, []string{"its disks are on scsi (by virtio, which Linux knows)", "BOOTX64.EFI", "Secure Boot is off"}, []string{"OVMF", "dev='sda' bus='scsi'", "dev='sdb' bus='scsi'"}},
	} {
		t.Run("from Hyper-V to KVM: "+c.name, func(t *testing.T) {
			j := j.in(t, true)
			name := map[bool]string{true: "made1", false: "made2"}[c.ide]
			spec := host.Spec{Name: name, Linux: true, IDE: c.ide}
			system, data := j.disks(name)
			for i, raw := range []string{system, data} {
				path := fmt.Sprintf(`C:\VMs\%s\%d.vhdx`, name, i)
				j.ok(os.MkdirAll(filepath.Dir(j.hv.Local(path)), 0o755))
				j.ok(run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", raw, j.hv.Local(path)))
				spec.Disks = append(spec.Disks, host.DiskSpec{Path: path, Bytes: map[int]int64{0: systemBytes, 1: dataBytes}[i], Exists: true})
			}
			_, err := j.hv.AddVM(spec)
			j.ok(err)
			j.run("0", "backup", j.hyperv(name), "--consistency", "crash", "--audit", "0")
			j.says(j.run(fmt.Sprint(c.code), "restore", name, "--to", j.lab.KVM(name), "--start"), c.restored...)
			v, definition := j.wakes(name)
			j.says(definition, append(c.devices, "<memory unit='KiB'>1048576</memory>", ">2</vcpu>")...)
			j.ok(v.Remove(j.ctx))
		})
	}
}

// A trip is from KVM to Hyper-V and back.
type trip struct {
	name          string
	uefi, running bool
	bus           string   // that is asked for
	soak          bool     // not in every run
	there, back   []string // said on the way
	devices       []string // of the VM that comes back
}

func (c trip) travel(j *journey) {
	name := "trip"
	if c.uefi {
		name += "-uefi"
	}
	if c.running {
		name += "-on"
	}
	system, data := j.disks(name)
	o := lab.VMOptions{Name: name, FromDisk: true, Disks: []lab.VMDisk{{Path: system}, {Path: data}},
		ExtraDevices: "<interface type='user'><model type='virtio'/></interface>"}
	if c.uefi {
		o.NVRAM = j.lab.Path(name + "_VARS.fd")
	}
	v, err := j.lab.Define(j.ctx, j.guest, o)
	j.ok(err)
	kept := ""
	if c.running {
		j.ok(v.Start(j.ctx))
		j.ok(v.WaitAgent(j.ctx))
		kept, err = v.Shell(j.ctx, "dd if=/dev/urandom of=/data/kept bs=64k count=33 2>/dev/null; sync; sha256sum /data/kept")
		j.ok(err)
		// A machine under load may take longer to freeze than a guest may wait.
		j.run("0 or 4", "backup", j.lab.KVM(name), "--scratch-dir", j.lab.Path("scratch"))
	} else {
		j.run("0 or 4", "backup", j.lab.KVM(name), "--scratch-dir", j.lab.Path("scratch"), "--consistency", "crash") // UEFI has no variables yet
	}
	j.ok(v.Remove(j.ctx))
	before, _ := j.described(name)
	if !c.running { // else it has written since
		j.same(filepath.Join(before, "vda.raw"), system)
		j.same(filepath.Join(before, "vdb.raw"), data)
	}

	there := name + "-hv"
	args := []string{"restore", name, "--to", j.hyperv(there), "--folder", `C:\VMs`}
	if c.running {
		args = append(args, "--start")
	}
	code := "0"
	if c.uefi {
		code = "4" // Secure Boot
	}
	j.says(j.run(code, args...), c.there...)
	for _, disk := range []string{"vda", "vdb"} {
		raw := filepath.Join(before, "there-"+disk)
		j.ok(rawOf(j.hv.Local(`C:\VMs\`+there+`\`+there+"-"+disk+".vhdx"), raw))
		j.same(raw, filepath.Join(before, disk+".raw"))
	}
	if c.running {
		j.ok(j.hv.SetGuest(there, bareLinux))
	}
	j.run("0", "backup", j.hyperv(there), "--consistency", "crash", "--audit", "0")
	after, def := j.described(there)
	want := vm.Definition{Firmware: "bios", Guest: def.Guest, Processors: 1, MemoryBytes: 256 << 20}
	ids := []vm.DiskID{"ide0:0", "scsi0:0"}
	if c.uefi {
		want.Firmware, ids = "uefi", []vm.DiskID{"scsi0:0", "scsi0:1"}
	}
	if c.running {
		want.Guest = vm.GuestLinux
	}
	if def.Firmware != want.Firmware || def.Guest != want.Guest || def.Processors != want.Processors || def.MemoryBytes != want.MemoryBytes || len(def.Disks) != 2 || len(def.NICs) != 1 {
		j.Errorf("on Hyper-V it is %+v, want %+v with two disks and a network card", def, want)
	}
	for i, id := range ids {
		if !slices.ContainsFunc(def.Disks, func(p vm.DiskPlace) bool { return p.ID == id }) {
			j.Errorf("on Hyper-V it has no disk %s", id)
		}
		j.same(filepath.Join(after, strings.ReplaceAll(string(id), ":", "%3A")+".raw"), filepath.Join(before, fmt.Sprintf("vd%c.raw", 'a'+i)))
	}

	back := name + "-back"
	args = []string{"restore", there, "--to", j.lab.KVM(back), "--start"}
	if c.bus != "" {
		args = append(args, "--bus", c.bus)
	}
	j.says(j.run("0", args...), c.back...)
	v, definition := j.wakes(back)
	j.says(definition, append(c.devices, "<memory unit='KiB'>262144</memory>", ">1</vcpu>")...)
	if c.running {
		if got, err := v.Shell(j.ctx, "sha256sum /data/kept"); err != nil || got != kept {
			j.Errorf("the file that the guest wrote is %q, %v, and was %q", got, err, kept)
		}
	}
	j.ok(v.Remove(j.ctx))
}
