package nbd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
)

// need skips the test where a program is missing, unless tests may not skip.
func need(t *testing.T, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
			t.Fatalf("%s is missing and this test may not be skipped", program)
		}
		t.Skipf("%s is missing", program)
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// serve starts a server in the foreground and waits for its socket.
func serve(t *testing.T, name string, args ...string) (Target, *exec.Cmd) {
	t.Helper()
	need(t, name)
	// Not t.TempDir: a socket's path has room for about 100 bytes.
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	// The socket is there before anybody listens to it; this is not.
	sock, ready := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	switch name {
	case "qemu-nbd":
		args = append([]string{"--persistent", "--socket=" + sock, "--pid-file=" + ready}, args...)
	case "nbdkit":
		args = append([]string{"--foreground", "--unix=" + sock, "--pidfile=" + ready}, args...)
	}
	cmd := exec.Command(name, args...)
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		os.RemoveAll(dir)
		if t.Failed() {
			t.Logf("%s said: %s", name, log.String())
		}
	})
	for range 30_000 {
		if _, err := os.Stat(ready); err == nil {
			return Target{Network: "unix", Address: sock}, cmd
		}
		select {
		case <-ended:
			t.Fatalf("%s %v ended: %s", name, args, log.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Fatalf("%s did not make its socket", name)
	panic("unreachable")
}

func dialT(t *testing.T, target Target) *Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c, err := Dial(ctx, target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// sparse makes a raw image with data in the given 64 KiB blocks and holes
// elsewhere, and gives its bytes.
func sparse(t *testing.T, size int, blocks ...int) (file string, content []byte) {
	t.Helper()
	content = make([]byte, size)
	r := rand.NewChaCha8([32]byte{1})
	file = filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	for _, b := range blocks {
		p := content[b<<16 : min((b+1)<<16, size)]
		r.Read(p)
		if _, err := f.WriteAt(p, int64(b)<<16); err != nil {
			t.Fatal(err)
		}
	}
	return file, content
}

// compare reads at random, from several goroutines, and wants what content says.
func compare(t *testing.T, c *Client, content []byte) {
	t.Helper()
	if c.Size() != int64(len(content)) {
		t.Fatalf("size %d, want %d", c.Size(), len(content))
	}
	seed := uint64(time.Now().UnixNano())
	var wg sync.WaitGroup
	for g := range uint64(8) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, g))
			for range 60 {
				off := r.Int64N(int64(len(content)))
				p := make([]byte, r.IntN(300_000))
				if r.IntN(20) == 0 {
					p = make([]byte, 6<<20) // more than one request may move
				}
				n, err := c.ReadAt(p, off)
				want := min(len(p), len(content)-int(off))
				if n != want || n == len(p) && err != nil || n < len(p) && err != io.EOF {
					t.Errorf("seed %d: read of %d at %d gave %d, %v", seed, len(p), off, n, err)
					return
				}
				if !bytes.Equal(p[:n], content[off:off+int64(n)]) {
					t.Errorf("seed %d: read of %d at %d gave other bytes", seed, len(p), off)
					return
				}
			}
		})
	}
	wg.Wait()
	if n, err := c.ReadAt(make([]byte, 1), c.Size()); n != 0 || err != io.EOF {
		t.Errorf("read behind the end gave %d, %v", n, err)
	}
}

// collect gives the extents whose flags have bit set.
func collect(t *testing.T, c *Client, name string, within extent.Extent, bit uint32) (set extent.Set) {
	t.Helper()
	at := within.Off
	for s, err := range c.BlockStatus(t.Context(), name, within) {
		if err != nil {
			t.Fatal(err)
		}
		if s.Off != at {
			t.Fatalf("extent at %d follows after %d", s.Off, at)
		}
		at = s.End()
		if s.Flags&bit != 0 {
			set.Add(s.Extent)
		}
	}
	if at != within.End() {
		t.Fatalf("block status of %v ends at %d", within, at)
	}
	return set
}

func TestReadsWhatQemuServes(t *testing.T) {
	need(t, "qemu-nbd")
	file, content := sparse(t, 10<<20+512, 0, 3, 4, 5, 77, 160)
	target, _ := serve(t, "qemu-nbd", "--read-only", "--format=raw", "--shared=4", "--export-name=disk", file)
	target.Export, target.Connections, target.MetaContexts = "disk", 4, []string{"base:allocation"}
	c := dialT(t, target)
	if c.Connections() != 4 || !c.ReadOnly() || !slices.Equal(c.Contexts(), []string{"base:allocation"}) {
		t.Errorf("%d connections, read-only %v, contexts %v", c.Connections(), c.ReadOnly(), c.Contexts())
	}
	compare(t, c, content)

	within := extent.Extent{Off: 100, Len: c.Size() - 300}
	holes := collect(t, c, "base:allocation", within, StateHole)
	data := extent.NewSet(within).Subtract(holes)
	want := extent.NewSet(extent.Extent{Off: 100, Len: 1<<16 - 100}, extent.Extent{Off: 3 << 16, Len: 3 << 16},
		extent.Extent{Off: 77 << 16, Len: 1 << 16}, extent.Extent{Off: 160 << 16, Len: 512 - 200})
	if fmt.Sprint(data) != fmt.Sprint(want) {
		t.Errorf("data %v, want %v", data, want)
	}
	if err := c.WriteZeroes(t.Context(), extent.Extent{Len: 512}, true); !errors.Is(err, fault.ErrReadOnly) {
		t.Errorf("writing read-only: %v", err)
	}
	c.Close() // the server takes no more than four
	names, err := List(t.Context(), target)
	if err != nil || !slices.Equal(names, []string{"disk"}) {
		t.Errorf("exports %q, %v", names, err)
	}
	target.Export = "other"
	if _, err := Dial(t.Context(), target); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("unknown export: %v", err)
	}
}

func TestSeesADirtyBitmap(t *testing.T) {
	need(t, "qemu-img")
	need(t, "qemu-io")
	file := filepath.Join(t.TempDir(), "disk.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", file, "6G")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", file)
	run(t, "qemu-img", "bitmap", "--add", "-g", "64K", file, "cbt")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 128K 64K", "-c", "write -P 3 5G 4K", "-c", "write -P 3 6442385408 64K", file)
	target, _ := serve(t, "qemu-nbd", "--read-only", "--format=qcow2", "--bitmap=cbt", file)
	name := "qemu:dirty-bitmap:cbt"
	target.MetaContexts = []string{"base:allocation", name, "qemu:dirty-bitmap:none"}
	found, err := ListContexts(t.Context(), target, "qemu:dirty-bitmap:")
	if err != nil || !slices.Equal(found, []string{name}) {
		t.Errorf("contexts %v, %v", found, err)
	}
	c := dialT(t, target)
	if !slices.Equal(c.Contexts(), []string{"base:allocation", name}) {
		t.Errorf("contexts %v", c.Contexts())
	}
	all := extent.Extent{Len: c.Size()}
	dirty := collect(t, c, name, all, StateDirty)
	want := extent.NewSet(extent.Extent{Off: 128 << 10, Len: 64 << 10}, extent.Extent{Off: 5 << 30, Len: 64 << 10}, extent.Extent{Off: 6442385408, Len: 64 << 10})
	if fmt.Sprint(dirty) != fmt.Sprint(want) {
		t.Errorf("dirty %v, want %v", dirty, want)
	}
	zero := collect(t, c, "base:allocation", all, StateZero)
	if extent.NewSet(all).Subtract(zero).Bytes() != 1<<20+4<<10+64<<10 {
		t.Errorf("data %v", extent.NewSet(all).Subtract(zero))
	}
	for _, err := range c.BlockStatus(t.Context(), "qemu:dirty-bitmap:none", all) {
		if !errors.Is(err, fault.ErrUnsupported) {
			t.Errorf("a context that is not there: %v", err)
		}
	}
}

func TestWritesWhatQemuReads(t *testing.T) {
	need(t, "qemu-nbd")
	file, content := sparse(t, 9<<20, 1, 2, 100)
	target, cmd := serve(t, "qemu-nbd", "--format=raw", "--discard=unmap", "--shared=2", file)
	target.Connections = 2
	c := dialT(t, target)
	r := rand.NewChaCha8([32]byte{2})
	write := func(off, n int) {
		r.Read(content[off : off+n])
		if n2, err := c.WriteAt(content[off:off+n], int64(off)); n2 != n || err != nil {
			t.Fatalf("write gave %d, %v", n2, err)
		}
	}
	write(0, 5<<20) // two requests
	write(7<<20+12, 4096)
	clear(content[1<<20 : 3<<20])
	if err := c.WriteZeroes(t.Context(), extent.Extent{Off: 1 << 20, Len: 2 << 20}, true); err != nil {
		t.Fatal(err)
	}
	if err := c.Trim(t.Context(), extent.Extent{Off: 8 << 20, Len: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteAt([]byte{1}, c.Size()); err == nil {
		t.Error("a write behind the end went through")
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := c.ReadAt(make([]byte, 1), 0); !errors.Is(err, errClosed) {
		t.Errorf("read after Close: %v", err)
	}
	cmd.Process.Signal(os.Interrupt)
	got, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(got[:8<<20], content[:8<<20]) {
		t.Errorf("the file differs, %v", err)
	}
}

func TestOtherServers(t *testing.T) {
	need(t, "nbdkit")
	file, content := sparse(t, 1<<20+100, 0, 5)
	for _, c := range []struct {
		name string
		args []string
	}{
		{"plain", []string{"file", file}},
		{"simple replies", []string{"--no-sr", "file", file}},
		{"no extents", []string{"--filter=noextents", "file", file}},
		{"blocks of 512 to 64K, others refused", []string{"--filter=blocksize-policy", "--filter=truncate", "file", file,
			"blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error", "round-up=512"}},
		{"oldest negotiation", []string{"--mask-handshake=1", "file", file}},
		{"one connection alone", []string{"--filter=multi-conn", "file", file, "multi-conn-mode=disable"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			target, _ := serve(t, "nbdkit", append([]string{"--readonly"}, c.args...)...)
			target.Connections, target.MetaContexts = 3, []string{"base:allocation"}
			client := dialT(t, target)
			want := content
			if client.Size() > int64(len(want)) {
				want = append(slices.Clone(want), make([]byte, client.Size()-int64(len(want)))...)
			}
			compare(t, client, want)
			if c.name == "one connection alone" && client.Connections() != 1 {
				t.Errorf("%d connections", client.Connections())
			}
		})
	}
}

func TestRequestsArePipelined(t *testing.T) {
	file, _ := sparse(t, 1<<20, 0)
	target, _ := serve(t, "nbdkit", "--readonly", "--filter=delay", "file", file, "rdelay=1")
	c := dialT(t, target)
	start := time.Now()
	var wg sync.WaitGroup
	const reads = 40 // of which the server carries out 16 at once
	for i := range int64(reads) {
		wg.Go(func() {
			if _, err := c.ReadAt(make([]byte, 4096), i*4096); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if d := time.Since(start); d >= reads*time.Second {
		t.Errorf("%d reads of 1 s each took %v, as one after the other", reads, d)
	}
}

func TestServersErrorsReachTheCaller(t *testing.T) {
	file, content := sparse(t, 1<<20, 0)
	target, _ := serve(t, "nbdkit", "--filter=error", "file", file, "error-pread=EIO", "error-pread-rate=100%", "error-pread-file="+file+".on",
		"error-pwrite=ENOSPC", "error-pwrite-rate=100%", "error-pwrite-file="+file+".on")
	c := dialT(t, target)
	os.WriteFile(file+".on", nil, 0o600)
	p := make([]byte, 4096)
	var ne *Error
	if _, err := c.ReadAt(p, 0); !errors.As(err, &ne) || ne.Errno != 5 {
		t.Errorf("read: %v", err)
	}
	if _, err := c.WriteAt(p, 0); !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("write: %v", err)
	}
	os.Remove(file + ".on")
	if _, err := c.ReadAt(p, 0); err != nil || !bytes.Equal(p, content[:4096]) {
		t.Errorf("after the trouble: %v", err)
	}
}

func TestServerKilledInTheMiddle(t *testing.T) {
	file, _ := sparse(t, 1<<20, 0)
	target, cmd := serve(t, "nbdkit", "--readonly", "--filter=delay", "file", file, "rdelay=60")
	target.Connections = 2
	c := dialT(t, target)
	errs := make(chan error)
	for range 6 {
		go func() {
			_, err := c.ReadAt(make([]byte, 4096), 0)
			errs <- err
		}()
	}
	time.Sleep(50 * time.Millisecond)
	cmd.Process.Kill()
	for range 6 {
		select {
		case err := <-errs:
			if err == nil {
				t.Error("a read from a dead server was good")
			}
		case <-time.After(50 * time.Second):
			t.Fatal("somebody waits for a dead server")
		}
	}
}

func TestCancelledReadReturnsAtOnce(t *testing.T) {
	file, content := sparse(t, 1<<20, 0)
	target, _ := serve(t, "nbdkit", "--readonly", "--filter=delay", "file", file, "rdelay=1500ms")
	c := dialT(t, target)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	p := make([]byte, 4096)
	if _, err := c.ReadAtContext(ctx, p, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	// The connection lives on, and the late answer goes nowhere.
	q := make([]byte, 4096)
	if _, err := c.ReadAt(q, 0); err != nil || !bytes.Equal(q, content[:4096]) {
		t.Errorf("the next read: %v", err)
	}
	if !bytes.Equal(p, make([]byte, 4096)) {
		t.Error("the late answer was written to a buffer that nobody lent")
	}
}

// certificates makes a CA and a server's certificate as GnuTLS wants them.
func certificates(t *testing.T) (dir string, pool *x509.CertPool) {
	t.Helper()
	dir = t.TempDir()
	put := func(name, kind string, der []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caKey, serverKey := key(), key()
	caDER, err := x509.CreateCertificate(crand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	server := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	serverDER, err := x509.CreateCertificate(crand.Reader, server, ca, serverKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(serverKey)
	if err != nil {
		t.Fatal(err)
	}
	put("ca-cert.pem", "CERTIFICATE", caDER)
	put("server-cert.pem", "CERTIFICATE", serverDER)
	put("server-key.pem", "PRIVATE KEY", keyDER)
	pool = x509.NewCertPool()
	cert, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(cert)
	return dir, pool
}

func TestTLS(t *testing.T) {
	need(t, "nbdkit")
	need(t, "qemu-nbd")
	dir, pool := certificates(t)
	file, content := sparse(t, 1<<20, 3)
	for name, args := range map[string][]string{
		"nbdkit":   {"--readonly", "--tls=require", "--tls-certificates=" + dir, "file", file},
		"qemu-nbd": {"--read-only", "--format=raw", "--object=tls-creds-x509,id=t,endpoint=server,verify-peer=no,dir=" + dir, "--tls-creds=t", file},
	} {
		t.Run(name, func(t *testing.T) {
			target, _ := serve(t, name, args...)
			if _, err := Dial(t.Context(), target); err == nil {
				t.Error("a server that wants TLS was opened without")
			}
			target.TLS = &tls.Config{ServerName: "localhost"}
			if _, err := Dial(t.Context(), target); err == nil {
				t.Error("a certificate of nobody was believed")
			}
			target.TLS.RootCAs = pool
			compare(t, dialT(t, target), content)
		})
	}
	t.Run("no TLS there", func(t *testing.T) {
		target, _ := serve(t, "nbdkit", "--readonly", "file", file)
		target.TLS = &tls.Config{ServerName: "localhost", RootCAs: pool}
		if _, err := Dial(t.Context(), target); err == nil {
			t.Error("fell back to the clear")
		}
	})
}
