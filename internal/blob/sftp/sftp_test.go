package sftp

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/retry"
	"github.com/backstay/backstay/internal/fault"
)

// fakeSSH stands in for the ssh program and the network; what it runs is given.
func fakeSSH(t *testing.T, script string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "ssh")
	if err := os.WriteFile(name, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

// server is an ssh that leads to OpenSSH's own SFTP server on this machine.
func server(t *testing.T) string {
	t.Helper()
	const exe = "/usr/lib/openssh/sftp-server"
	if _, err := os.Stat(exe); err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "" {
			t.Fatal("OpenSSH's sftp-server is not installed, and this test may not be skipped")
		}
		t.Skip("OpenSSH's sftp-server is not installed (scripts/need test)")
	}
	return fakeSSH(t, "echo $$ >> $(dirname $0)/pids; exec "+exe+" -e 2>/dev/null")
}

func openIn(t *testing.T, ssh, dir string) blob.Store {
	t.Helper()
	st, err := open(t.Context(), Location{Host: "server", Path: dir}, ssh, false)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestStore(t *testing.T) {
	ssh := server(t)
	blobtest.Run(t, func(t *testing.T) blob.Store { return openIn(t, ssh, t.TempDir()) })
}

func TestADirectoryThatIsToBeMade(t *testing.T) {
	ssh := server(t)
	dir := t.TempDir() + "/new"
	l := Location{Host: "server", Path: dir}
	if _, err := open(t.Context(), l, ssh, false); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("open: %v", err)
	}
	for range 2 {
		st, err := open(t.Context(), l, ssh, true)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := st.(blob.Locker); ok {
			t.Error("it claims to have locks")
		}
		st.Close()
	}
	if _, err := open(t.Context(), Location{Host: "server", Path: dir + "/a/b"}, ssh, true); err == nil {
		t.Error("parents were made too")
	}
}

func TestAConnectionThatBreaksIsMadeAgain(t *testing.T) {
	ssh := server(t)
	st := retry.Wrap(openIn(t, ssh, t.TempDir()), retry.Options{First: time.Millisecond})
	defer st.Close()
	for i, name := range []string{"a", "b", "c"} {
		r, n := blobtest.Body([]byte(name))
		if err := st.Create(t.Context(), name, r, n); err != nil {
			t.Fatal(err)
		}
		pids, err := os.ReadFile(filepath.Join(filepath.Dir(ssh), "pids"))
		if err != nil {
			t.Fatal(err)
		}
		list := strings.Fields(string(pids))
		if len(list) != i+1 {
			t.Fatalf("%d connections after %d breaks", len(list), i)
		}
		if out, err := exec.Command("kill", "-9", list[i]).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	if names, err := blobtest.Names(t.Context(), st, ""); err != nil || len(names) != 3 {
		t.Errorf("%v, %v", names, err)
	}
}

func TestWhatCrashesLeftIsSweptAfterAWeek(t *testing.T) {
	ssh, dir := server(t), t.TempDir()
	if err := os.Mkdir(dir+"/tmp", 0o700); err != nil {
		t.Fatal(err)
	}
	for name, age := range map[string]time.Duration{"old": 8 * 24 * time.Hour, "young": 6 * 24 * time.Hour} {
		if err := os.WriteFile(dir+"/tmp/"+name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		at := time.Now().Add(-age)
		if err := os.Chtimes(dir+"/tmp/"+name, at, at); err != nil {
			t.Fatal(err)
		}
	}
	st := openIn(t, ssh, dir)
	defer st.Close()
	r, n := blobtest.Body([]byte("x"))
	if err := st.Put(t.Context(), "a", r, n); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir + "/tmp")
	if err != nil || len(left) != 1 || left[0].Name() != "young" {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestAFullDisk(t *testing.T) {
	ssh := server(t)
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small file system")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", dir).CombinedOutput(); err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "" {
			t.Fatalf("mount: %v\n%s", err, out)
		}
		t.Skipf("cannot mount a small file system: %s", out)
	}
	defer exec.Command("umount", dir).Run()
	st := openIn(t, ssh, dir)
	defer st.Close()
	r, n := blobtest.Body(make([]byte, 4<<20))
	if err := st.Put(t.Context(), "a", r, n); !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("put: %v", err)
	}
	if names, err := blobtest.Names(t.Context(), st, ""); err != nil || len(names) > 0 {
		t.Errorf("%v, %v", names, err)
	}
}

func TestServersThatCannotBeUsed(t *testing.T) {
	// An SFTP version answer without extensions: length 5, type 2, version 3.
	const bare = `printf '\000\000\000\005\002\000\000\000\003'; cat >/dev/null`
	for _, c := range []struct {
		name, script string
		want         error
		words        string
	}{
		{"no key", "echo 'root@server: Permission denied (publickey).' >&2; exit 255", fault.ErrDenied, "publickey"},
		{"another host key", "echo 'Host key verification failed.' >&2; exit 255", fault.ErrDenied, "Host key"},
		{"without extensions", bare, fault.ErrUnsupported, "fsync@openssh.com"},
		{"no such host", "echo 'Could not resolve hostname server' >&2; exit 255", nil, "Could not resolve"},
	} {
		_, err := open(t.Context(), Location{Host: "server", Path: "/x"}, fakeSSH(t, c.script), false)
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if _, err := open(t.Context(), Location{Host: "server", Path: "/x"}, filepath.Join(t.TempDir(), "none"), false); err == nil {
		t.Error("without ssh: no error")
	}
}

func TestParseURL(t *testing.T) {
	for s, want := range map[string]Location{
		"sftp://backup@nas.example/srv/backup": {User: "backup", Host: "nas.example", Path: "/srv/backup"},
		"sftp://nas:2222/srv":                  {Host: "nas", Port: 2222, Path: "/srv"},
		"sftp://nas/~/backup":                  {Host: "nas", Path: "backup"},
		"sftp://[fe80::1]:22/srv":              {Host: "fe80::1", Port: 22, Path: "/srv"},
	} {
		got, err := ParseURL(s)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
		if again, err := ParseURL(got.String()); err != nil || again != got {
			t.Errorf("%s: became %s", s, got)
		}
	}
	for _, s := range []string{"sftp://", "sftp://host", "sftp://host/", "sftp://u:hunter2@host/x", "sftp://-oProxyCommand=x/y", "sftp://-l@host/y", "sftp://host:0/x", "sftp://host/x?y=z", "ssh://host/x"} {
		_, err := ParseURL(s)
		if err == nil {
			t.Errorf("%s was taken", s)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error shows the password", s)
		}
	}
	args := Location{User: "u", Host: "h", Port: 2222, Path: "/x"}.command("ssh").Args
	if got := strings.Join(args[4:], " "); got != "-p 2222 -l u -s -- h sftp" {
		t.Errorf("ssh is called with %q", got)
	}
}
