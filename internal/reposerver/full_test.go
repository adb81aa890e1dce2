package reposerver

import (
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// On a full disk an administrator who frees room has what is kept back for him,
// and a backup client has not, whatever it says it does.
func TestAFullServer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small file system")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", dir).CombinedOutput(); err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "" {
			t.Fatalf("mount: %v\n%s", err, out)
		}
		t.Skipf("cannot mount a small file system: %s", out)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", dir).Run() })
	g := &rig{t: t, dir: dir, o: Options{ImmutableFor: -1, Dir: dir, Log: slog.New(slog.DiscardHandler)}, addr: "127.0.0.1:0"}
	g.start()
	t.Cleanup(func() { g.stop() })
	admin := g.open("root", Admin, "r")
	web := g.openAs(g.token("web01", Backup, "r"), "r")
	if err := createIn(t, web, "session/"+mine, "x"); err != nil {
		t.Fatal(err)
	}
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	for err == nil {
		_, err = ballast.Write(make([]byte, 512))
	}
	ballast.Close()

	freeing := blob.Freeing(t.Context())
	body := strings.NewReader("freed")
	name := "epoch/0000000001"
	if err := admin.Create(t.Context(), name, body, body.Size()); !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("an administrator who copies: %v", err)
	}
	if err := web.Put(freeing, "beat/"+mine[:26], body, body.Size()); !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("a backup that says it frees: %v", err)
	}
	if err := admin.Create(freeing, name, body, body.Size()); err != nil {
		t.Errorf("an administrator who frees: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "r", name)); err != nil || string(b) != "freed" {
		t.Errorf("stored %q, %v", b, err)
	}
}
