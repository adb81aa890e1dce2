// Package s3test starts a real S3 server for tests and puts an HTTP proxy with
// latency and faults before it.
package s3test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/backstay/backstay/internal/blob/blobtest"
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
	dir, versions := t.TempDir(), t.TempDir()
	at := blobtest.Server{
		Program: "versitygw", Beside: "bin/versitygw",
		Env: []string{"ROOT_ACCESS_KEY=" + AccessKey, "ROOT_SECRET_KEY=" + SecretKey},
		Args: func(host, port string) []string {
			return []string{"--port", net.JoinHostPort(host, port), "--quiet", "posix", "--versioning-dir", versions, dir}
		},
	}.Start(t)
	return &Gateway{Endpoint: at, dir: dir}
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
