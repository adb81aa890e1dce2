// Package s3test starts a real S3 server for tests and puts an HTTP proxy with
// latency and faults before it.
package s3test

import (
	"bytes"
	"fmt"
	"go/build"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// What the server takes for its administrator, and its region.
const (
	AccessKey = "backstay-test"
	SecretKey = "backstay-test-secret"
	Region    = "us-east-1"
)

// A Gateway is a running versitygw, an S3 server over a directory. It ends
// with its test.
type Gateway struct {
	Endpoint string // host:port, without TLS
	dir      string
	buckets  atomic.Int64
}

// Start starts a Gateway. Where versitygw is not installed the test is
// skipped, or fails if it may not be.
func Start(t testing.TB) *Gateway {
	t.Helper()
	exe, err := exec.LookPath("versitygw")
	if err != nil {
		exe = filepath.Join(build.Default.GOPATH, "bin", "versitygw")
		_, err = os.Stat(exe)
	}
	if err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "" {
			t.Fatal("versitygw is not installed, and this test may not be skipped")
		}
		t.Skip("versitygw is not installed (scripts/need test)")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &Gateway{Endpoint: l.Addr().String(), dir: t.TempDir()}
	l.Close()
	cmd := exec.Command(exe, "--port", g.Endpoint, "--quiet", "posix", "--versioning-dir", t.TempDir(), g.dir)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+AccessKey, "ROOT_SECRET_KEY="+SecretKey)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 400 {
		if c, err := net.Dial("tcp", g.Endpoint); err == nil {
			c.Close()
			return g
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("versitygw did not start:\n%s", out.String())
	return nil
}

// Bucket makes a bucket and gives its name.
func (g *Gateway) Bucket(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("bucket%d", g.buckets.Add(1))
	if err := os.Mkdir(g.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

// LockedBucket makes a bucket with Object Lock, and so with versions.
func (g *Gateway) LockedBucket(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("bucket%d", g.buckets.Add(1))
	if err := g.Client(t).MakeBucket(t.Context(), name, minio.MakeBucketOptions{ObjectLocking: true}); err != nil {
		t.Fatal(err)
	}
	return name
}

// Dir is where the server keeps a bucket.
func (g *Gateway) Dir(bucket string) string { return filepath.Join(g.dir, bucket) }

// Credentials are the administrator's.
func Credentials() *credentials.Credentials {
	return credentials.NewStaticV4(AccessKey, SecretKey, "")
}

// Client is a client with every right.
func (g *Gateway) Client(t testing.TB) *minio.Client {
	t.Helper()
	c, err := minio.New(g.Endpoint, &minio.Options{Creds: Credentials(), Region: Region})
	if err != nil {
		t.Fatal(err)
	}
	return c
}
