package hyperv_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/hypervisor/drivertest"
	"github.com/backstay/backstay/internal/hypervisor/hyperv"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb/smbtest"
	"github.com/backstay/backstay/internal/vm"
	sim "github.com/backstay/backstay/sim/hyperv"
)

// realHost names a VM of a real host, as "backstay backup" takes it, against
// which the tests of the driver run instead of the simulator. Checkpoints and
// reference points of that VM are made and taken away; nothing else is touched.
// realPassword is the file with the password.
const (
	realHost     = "BACKSTAY_HYPERV_URL"
	realPassword = "BACKSTAY_HOST_PASSWORD_FILE"
)

// maxRealDisk bounds the disk of the VM of a real host, since the suite holds
// several of its states in memory.
const maxRealDisk = 1 << 30

// realSubject is the VM of a real host, on its smallest disk. Its guest is the
// only one to write there.
func realSubject(t *testing.T, source string) drivertest.Subject {
	t.Helper()
	u, name, err := hyperv.ParseSource(source)
	if err != nil {
		t.Fatal(err)
	}
	if name == "" {
		t.Fatalf("%s names no VM, and only one that it names is touched", realHost)
	}
	d, err := hyperv.Open(t.Context(), hyperv.Options{Host: u, Password: realSecret(t), StateDir: imagetest.MemoryDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	machines, err := d.Machines(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(machines, func(m vm.Machine) bool { return m.Name == name || strings.EqualFold(m.UUID, name) })
	if i < 0 {
		t.Fatalf("the host has no VM %q", name)
	}
	var disk vm.Disk
	for _, e := range machines[i].Disks {
		if e.Excluded == "" && e.SizeBytes >= 4<<20 && (disk.ID == "" || e.SizeBytes < disk.SizeBytes) {
			disk = e
		}
	}
	if disk.ID == "" || disk.SizeBytes > maxRealDisk {
		t.Fatalf("VM %q needs a disk of 4 MiB to 1 GiB for these tests: %+v", name, machines[i].Disks)
	}
	// Another run may have left its own, under the suite's repositories' names.
	t.Cleanup(func() {
		for _, repo := range drivertest.Repositories() {
			if err := d.ResetTracking(context.WithoutCancel(t.Context()), machines[i].UUID, repo); err != nil {
				t.Errorf("left on the host: %v", err)
			}
		}
	})
	return drivertest.Subject{Driver: d, Name: machines[i].Name, Disk: disk.ID, Tracks: disk.Format == "vhdx"}
}

func realSecret(t *testing.T) secret.Bytes {
	t.Helper()
	text, err := os.ReadFile(os.Getenv(realPassword))
	if err != nil {
		t.Fatalf("%s: %v", realPassword, err)
	}
	return secret.New([]byte(strings.TrimRight(string(text), "\r\n")))
}

// What is asked of a real host is asked of a simulated one by the same switch:
// it holds, what it leaves out it names, and nothing is left there.
func TestTheSwitchToARealHost(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	dir := imagetest.MemoryDir(t)
	samba := smbtest.Run(t, smbtest.Options{Dir: filepath.Join(dir, "C")})
	l := newLab(t, dir, samba, sim.Options{}, 4<<20)
	ctx, stop := context.WithCancel(t.Context())
	wrote := make(chan error, 1)
	go func() { wrote <- l.host.Guest(ctx, l.name, 20, 1) }()
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte(smbtest.Password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	source := *l.url
	source.Path = "/" + l.name
	cmd := exec.CommandContext(t.Context(), exe, "-test.v", "-test.run", "^Test(Conformance|Trouble)OfTheWholePath$")
	cmd.Env = append(os.Environ(), realHost+"="+source.String(), realPassword+"="+password)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v:\n%s", err, out)
	}
	for _, want := range []string{
		`(?m)--- PASS: TestConformanceOfTheWholePath/changed-is-never-too-little`,
		`(?m)--- PASS: TestConformanceOfTheWholePath/two-repositories-do-not-disturb-each-other`,
		`(?m)--- SKIP: TestConformanceOfTheWholePath/a-snapshot-stands-still`,
		`(?m)--- SKIP: TestConformanceOfTheWholePath/a-lost-checkpoint-is-never-an-incremental`,
		`(?m)--- SKIP: TestTroubleOfTheWholePath`,
		`needs a simulated one`,
	} {
		if !regexp.MustCompile(want).Match(out) {
			t.Errorf("no %s in:\n%s", want, out)
		}
	}
	stop()
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	if left := l.host.Instances("root/virtualization/v2", "Msvm_VirtualSystemReferencePoint"); len(left) > 0 {
		t.Errorf("%d reference points are left", len(left))
	}
}
