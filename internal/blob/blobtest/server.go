package blobtest

import (
	"bytes"
	"go/build"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// A Server is a storage server that nobody here wrote.
type Server struct {
	Program string // its name
	Beside  string // where scripts/need puts it, from GOPATH
	Env     []string
	Args    func(host, port string) []string
}

// Start starts the server on a free port of this machine and gives its
// host:port. It ends with the test. Where it is not installed the test is
// skipped, or fails if it may not be.
func (s Server) Start(t testing.TB) string {
	t.Helper()
	exe, err := exec.LookPath(s.Program)
	if err != nil {
		exe = filepath.Join(build.Default.GOPATH, s.Beside)
		_, err = os.Stat(exe)
	}
	if err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "" {
			t.Fatalf("%s is not installed, and this test may not be skipped", s.Program)
		}
		t.Skipf("%s is not installed (scripts/need test)", s.Program)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := l.Addr().String()
	l.Close()
	host, port, _ := net.SplitHostPort(at)
	cmd := exec.Command(exe, s.Args(host, port)...)
	cmd.Env = append(os.Environ(), s.Env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
	})
	for tries := 0; ; tries++ {
		if c, err := net.Dial("tcp", at); err == nil {
			c.Close()
			return at
		}
		select {
		case <-time.After(50 * time.Millisecond):
			if tries < 6000 { // a busy machine takes minutes
				continue
			}
			cmd.Process.Kill()
			<-ended
		case <-ended:
		}
		t.Fatalf("%s did not start, or ended:\n%s", s.Program, out.String())
	}
}
