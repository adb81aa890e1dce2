package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

//go:embed init.sh hook.sh shutdown.sh workload/main.go workload/record.go workload/verify.go workload/run.go workload/fill.go
var recipe embed.FS

// guestModules are what the guest needs from the kernel package besides what
// is built in; their own needs are found. ata_piix is for disks on IDE; the
// kernel has no driver for SATA.
var guestModules = []string{"virtio_pci", "virtio_blk", "virtio_scsi", "ata_piix", "sd_mod", "virtio_console", "virtio_rng", "ext4", "crc32c_generic", "crc32c_intel"}

// A Guest is a kernel and an initramfs ready to boot, in a cache directory.
type Guest struct {
	Kernel   string // file names
	Initrd   string
	Workload string // the guest's own program, which runs on the host, too
	boot     string // the first 48 MiB of a disk that boots by itself

	// KernelVersion is as the Debian package says it: "6.1.0-56-cloud-amd64".
	KernelVersion string
}

// BuildOptions are what Build may be told.
type BuildOptions struct {
	// Log is told in plain words what happens; nil for silence.
	Log func(format string, args ...any)
}

// Build makes a guest in the cache directory, or finds the one it made there
// earlier. An empty name means "backstay-lab" in the user's cache directory.
// It needs root, apt-get, dpkg-deb, busybox-static on the host's archive and
// Go; the first call downloads some 30 MB. Several processes may call it at
// once: the first builds, the others wait.
func Build(ctx context.Context, cache string, o BuildOptions) (*Guest, error) {
	g, err := build(ctx, cache, o)
	if err != nil {
		return nil, fmt.Errorf("build the guest: %w", err)
	}
	return g, nil
}

func build(ctx context.Context, cache string, o BuildOptions) (*Guest, error) {
	if runtime.GOARCH != "amd64" {
		return nil, errors.New("the lab's guest is for amd64 hosts only")
	}
	if o.Log == nil {
		o.Log = func(string, ...any) {}
	}
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			user = "/var/cache" // a system account without a home
		}
		cache = filepath.Join(user, "backstay-lab")
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	lock, err := lockFile(ctx, filepath.Join(cache, "lock"))
	if err != nil {
		return nil, err
	}
	defer lock.Close()

	version, err := recipeVersion()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "guest-"+version)
	if g, err := readGuest(dir); err == nil {
		return g, nil
	}
	// Half-made directories have other names, and go with the next build.
	old, _ := filepath.Glob(filepath.Join(cache, "making-*"))
	for _, d := range old {
		os.RemoveAll(d)
	}
	making, err := os.MkdirTemp(cache, "making-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(making)
	if err := makeGuest(ctx, filepath.Join(cache, "packages"), making, o.Log); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.Rename(filepath.Join(making, "guest"), dir); err != nil {
		return nil, err
	}
	return readGuest(dir)
}

// recipeVersion names everything that goes into a guest but the packages, so
// that a new program does not boot an old guest.
func recipeVersion() (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, "recipe 4", guestModules)
	err := fs.WalkDir(recipe, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := recipe.ReadFile(name)
		fmt.Fprintf(h, "%s %d\n%s", name, len(data), data)
		return err
	})
	return hex.EncodeToString(h.Sum(nil))[:12], err
}

func readGuest(dir string) (*Guest, error) {
	g := &Guest{
		Kernel:   filepath.Join(dir, "vmlinuz"),
		Initrd:   filepath.Join(dir, "initrd.img"),
		Workload: filepath.Join(dir, "workload"),
		boot:     filepath.Join(dir, "boot.img"),
	}
	for _, f := range []string{g.Kernel, g.Initrd, g.Workload, g.boot} {
		if _, err := os.Stat(f); err != nil {
			return nil, err
		}
	}
	version, err := os.ReadFile(filepath.Join(dir, "version"))
	g.KernelVersion = string(version)
	return g, err
}

// makeGuest leaves the finished files in work/guest.
func makeGuest(ctx context.Context, packages, work string, log func(string, ...any)) error {
	guest, tree := filepath.Join(work, "guest"), filepath.Join(work, "tree")
	for _, d := range []string{guest, tree, packages} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := buildWorkload(ctx, work, filepath.Join(guest, "workload")); err != nil {
		return err
	}
	debs := debSource{dir: packages, log: log}
	kernel, err := debs.kernelPackage(ctx)
	if err != nil {
		return err
	}
	kernelTree := filepath.Join(work, "kernel")
	if err := debs.unpack(ctx, kernel, kernelTree); err != nil {
		return err
	}
	version := strings.TrimPrefix(kernel, "linux-image-")
	if err := os.WriteFile(filepath.Join(guest, "version"), []byte(version), 0o644); err != nil {
		return err
	}
	if err := copyFile(filepath.Join(kernelTree, "boot/vmlinuz-"+version), filepath.Join(guest, "vmlinuz"), 0o644); err != nil {
		return err
	}
	userTree := filepath.Join(work, "user")
	if err := debs.unpack(ctx, "busybox-static", userTree); err != nil {
		return err
	}
	libraries, err := debs.unpackWithLibraries(ctx, "qemu-guest-agent", userTree, "usr/sbin/qemu-ga")
	if err != nil {
		return err
	}
	if err := fillTree(tree, kernelTree, userTree, filepath.Join(guest, "workload"), libraries); err != nil {
		return err
	}
	out, err := os.Create(filepath.Join(guest, "initrd.img"))
	if err != nil {
		return err
	}
	defer out.Close()
	// Not compressed: emulated processors unpack slowly.
	if err := writeCPIO(out, tree); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return debs.makeBoot(ctx, guest, filepath.Join(work, "loader"))
}

// fillTree puts the guest's root directory together.
func fillTree(tree, kernelTree, userTree, workload string, libraries []string) error {
	type file struct {
		from, to string
		mode     fs.FileMode
	}
	busybox := filepath.Join(userTree, "bin/busybox")
	if _, err := os.Stat(busybox); err != nil {
		busybox = filepath.Join(userTree, "usr/bin/busybox")
	}
	files := []file{
		{busybox, "bin/busybox", 0o755},
		{filepath.Join(userTree, "usr/sbin/qemu-ga"), "usr/sbin/qemu-ga", 0o755},
		{workload, "bin/workload", 0o755},
	}
	// Where Debian's loader looks without a cache of names. The kernel looks
	// for the loader itself, the first of them, where the program says.
	for i, l := range libraries {
		dir := "lib/x86_64-linux-gnu/"
		if i == 0 {
			dir = "lib64/"
		}
		files = append(files, file{l, dir + filepath.Base(l), 0o755})
	}
	modules, err := kernelModules(filepath.Join(kernelTree, "lib/modules"), guestModules...)
	if err != nil {
		return err
	}
	var order bytes.Buffer
	for _, m := range modules {
		files = append(files, file{m, "lib/modules/" + filepath.Base(m), 0o644})
		fmt.Fprintln(&order, "/lib/modules/"+filepath.Base(m))
	}
	for _, f := range files {
		if err := copyFile(f.from, filepath.Join(tree, f.to), f.mode); err != nil {
			return err
		}
	}
	script := func(name string) []byte {
		data, _ := recipe.ReadFile(name) // embedded, so it is there
		return data
	}
	for _, f := range []struct {
		name string
		data []byte
		mode fs.FileMode
	}{
		{"init", script("init.sh"), 0o755},
		{"etc/qemu/fsfreeze-hook", script("hook.sh"), 0o755},
		{"sbin/shutdown", script("shutdown.sh"), 0o755},
		{"lib/modules/order", order.Bytes(), 0o644},
		{"etc/os-release", []byte("ID=backstay-lab\nNAME=\"Backstay lab\"\nPRETTY_NAME=\"Backstay lab guest\"\nVERSION_ID=1\n"), 0o644},
	} {
		name := filepath.Join(tree, f.name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, f.data, f.mode); err != nil {
			return err
		}
	}
	return nil
}

// buildWorkload compiles the guest's program from the source in this binary,
// so that a Backstay without its source tree can build a lab, too.
func buildWorkload(ctx context.Context, work, out string) error {
	src := filepath.Join(work, "workload-src")
	if err := os.MkdirAll(src, 0o755); err != nil {
		return err
	}
	entries, err := recipe.ReadDir("workload")
	if err != nil {
		return err
	}
	for _, e := range entries {
		data, err := recipe.ReadFile("workload/" + e.Name())
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(src, e.Name()), data, 0o644); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(src, "go.mod"), []byte("module workload\n\ngo 1.24\n"), 0o644); err != nil {
		return err
	}
	program, err := exec.LookPath("go")
	if err != nil {
		program = "/usr/local/go/bin/go"
		if _, missing := os.Stat(program); missing != nil {
			return fmt.Errorf("the guest's program has to be compiled: %w", err)
		}
	}
	cmd := exec.CommandContext(ctx, program, "build", "-trimpath", "-ldflags=-s -w", "-o", out, ".")
	cmd.Dir = src
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=", "GOWORK=off", "GO111MODULE=on")
	if os.Getenv("HOME") == "" && os.Getenv("GOCACHE") == "" {
		cmd.Env = append(cmd.Env, "GOCACHE="+filepath.Join(work, "go-cache"))
	}
	return runQuiet(cmd)
}

// runQuiet runs cmd, and puts what it said into the error if there is one.
func runQuiet(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

func copyFile(from, to string, mode fs.FileMode) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, data, mode)
}

// lockFile waits until the file is locked by nobody else. The lock ends with
// the file's Close, or with this process.
func lockFile(ctx context.Context, name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for %s: %w", name, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// A debSource gets packages of the host's Debian release and keeps the files.
type debSource struct {
	dir     string
	updated bool
	log     func(string, ...any)
}

// kernelPackage asks what "linux-image-cloud-amd64" stands for today.
func (d *debSource) kernelPackage(ctx context.Context) (string, error) {
	names, err := d.depends(ctx, "linux-image-cloud-amd64")
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(names, func(n string) bool {
		return strings.HasPrefix(n, "linux-image-") && strings.HasSuffix(n, "-cloud-amd64")
	})
	if i < 0 {
		return "", fmt.Errorf("linux-image-cloud-amd64 depends on %q, and none of them is a kernel", names)
	}
	return names[i], nil
}

// depends lists what a package depends on. Where the host has no package
// lists yet it fetches them, once.
func (d *debSource) depends(ctx context.Context, name string) ([]string, error) {
	for {
		cmd := exec.CommandContext(ctx, "apt-cache", "depends", "--important", name)
		cmd.Env = append(os.Environ(), "LC_ALL=C")
		out, err := cmd.Output()
		var names []string
		for line := range strings.Lines(string(out)) {
			if dep, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && !strings.HasPrefix(dep, "<") {
				names = append(names, dep)
			}
		}
		if err == nil && len(names) > 0 {
			return names, nil
		}
		if d.updated {
			return nil, fmt.Errorf("apt-cache depends %s names nothing (%v)", name, err)
		}
		if err := d.update(ctx); err != nil {
			return nil, err
		}
	}
}

func (d *debSource) update(ctx context.Context) error {
	d.updated = true
	d.log("fetching Debian's package lists")
	return runQuiet(exec.CommandContext(ctx, "apt-get", "update", "-q"))
}

// unpack downloads a package, unless its file is here from an earlier build,
// and unpacks it into tree.
func (d *debSource) unpack(ctx context.Context, name, tree string) error {
	file, err := d.download(ctx, name)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(tree, 0o755); err != nil {
		return err
	}
	return runQuiet(exec.CommandContext(ctx, "dpkg-deb", "-x", file, tree))
}

func (d *debSource) download(ctx context.Context, name string) (string, error) {
	fetch := func() ([]string, error) {
		// Into an empty directory: how apt names the file is its own affair,
		// and a download that broke off never has a package's name.
		fresh, err := os.MkdirTemp(d.dir, "fetch-")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(fresh)
		cmd := exec.CommandContext(ctx, "apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", name)
		cmd.Dir = fresh
		if err := runQuiet(cmd); err != nil {
			return nil, err
		}
		got, err := filepath.Glob(filepath.Join(fresh, "*.deb"))
		for i, g := range got {
			got[i] = filepath.Join(d.dir, name+".deb")
			err = errors.Join(err, os.Rename(g, got[i]))
		}
		return got, err
	}
	kept := filepath.Join(d.dir, name+".deb")
	if _, err := os.Stat(kept); err == nil {
		return kept, nil
	}
	d.log("downloading %s", name)
	got, err := fetch()
	if err != nil && !d.updated && ctx.Err() == nil {
		// Lists that are days old name files that are gone.
		if err := d.update(ctx); err != nil {
			return "", err
		}
		got, err = fetch()
	}
	if err != nil {
		return "", err
	}
	if len(got) != 1 {
		return "", fmt.Errorf("apt-get download %s left %d files", name, len(got))
	}
	return kept, nil
}

// unpackWithLibraries unpacks a package, and of those it depends on as many
// as it takes until every library of its program is there.
func (d *debSource) unpackWithLibraries(ctx context.Context, name, tree, program string) ([]string, error) {
	if err := d.unpack(ctx, name, tree); err != nil {
		return nil, err
	}
	queue, seen := []string{name}, map[string]bool{}
	for ; ; queue = queue[1:] {
		found, missing, err := sharedObjects(tree, filepath.Join(tree, program))
		if err != nil || len(missing) == 0 {
			return found, err
		}
		if len(queue) == 0 {
			return nil, fmt.Errorf("no package that %s depends on has %s", name, strings.Join(missing, ", "))
		}
		names, err := d.depends(ctx, queue[0])
		if err != nil {
			continue // a package without dependencies has no further libraries
		}
		for _, n := range names {
			library := strings.HasPrefix(n, "lib") || n == "zlib1g"
			if seen[n] || !library || strings.Contains(n, "perl") {
				continue
			}
			seen[n] = true
			queue = append(queue, n)
			if err := d.unpack(ctx, n, tree); err != nil {
				return nil, err
			}
		}
	}
}
