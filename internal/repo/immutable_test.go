package repo

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/blob/s3"
	"github.com/backstay/backstay/internal/blob/s3/s3test"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
)

const twoWeeks = 14 * 24 * time.Hour

func initImmutable(t *testing.T, st blob.Store) {
	t.Helper()
	if err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap, ImmutableFor: twoWeeks}); err != nil {
		t.Fatal(err)
	}
}

// An attacker with everything that Backstay's server holds hides and
// overwrites every object and deletes what it can of every version. The
// repository as of a moment before gives every byte back, also of chunks that
// an older point had stored.
func TestAnAttackerWithTheServersCredentials(t *testing.T) {
	g := s3test.Start(t)
	bucket := g.LockedBucket(t)
	st := bucketAt(t, g.Endpoint, bucket)
	initImmutable(t, st)
	first := noise(1, 4<<20)
	p1, err := backup(bg, mustOpen(t, st), "web01", first, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	second := bytes.Clone(first)
	copy(second[1<<20:], noise(2, 1<<20))
	p2, err := backup(bg, mustOpen(t, st), "web01", second, p1, first)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	then := time.Now()
	time.Sleep(1100 * time.Millisecond)

	attacker := g.Client(t)
	type version struct{ key, id string }
	var all []version
	for o := range attacker.ListObjectsIter(bg, bucket, minio.ListObjectsOptions{Recursive: true, WithVersions: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		all = append(all, version{o.Key, o.VersionID})
	}
	denied := 0
	for i, v := range all {
		if err := attacker.RemoveObject(bg, bucket, v.key, minio.RemoveObjectOptions{VersionID: v.id, GovernanceBypass: true}); err != nil {
			denied++
		}
		if i%2 == 0 {
			if _, err := attacker.PutObject(bg, bucket, v.key, strings.NewReader("pay us"), 6, minio.PutObjectOptions{}); err != nil {
				t.Fatal(err)
			}
		} else if err := attacker.RemoveObject(bg, bucket, v.key, minio.RemoveObjectOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d versions, of which %d could not be deleted", len(all), denied)
	if r, err := Open(bg, st, testKey); err == nil {
		if points, _ := r.Points(bg); len(points) > 0 {
			t.Error("the attack did not work: this test shows nothing")
		}
	}
	direct, err := s3.Open(bg, s3.Location{Endpoint: g.Endpoint, Bucket: bucket, Region: s3test.Region}, s3.Options{Credentials: s3test.Credentials()})
	if err != nil {
		t.Fatal(err)
	}
	old, err := direct.AsOf(bg, then)
	if err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, old)
	points, err := r.Points(bg)
	if err != nil || len(points) != 2 {
		t.Fatalf("%d points, %v", len(points), err)
	}
	for p, want := range map[*point.RestorePoint][]byte{p1: first, p2: second} {
		got, err := readBack(r, p, FetchOptions{})
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: right: %v, %v", p.Ref(), bytes.Equal(got, want), err)
		}
	}
	// Nor does the server's own program do the attacker's work.
	if err := r.DeletePoint(bg, "web01", p1.ID); !errors.Is(err, fault.ErrLocked) {
		t.Errorf("delete: %v", err)
	}
}

// Before a point exists, what it needs of older sessions is kept for as long
// as the point is, and what is kept long enough is left alone.
func TestLockBeforeCommit(t *testing.T) {
	g := s3test.Start(t)
	bucket := g.LockedBucket(t)
	st := bucketAt(t, g.Endpoint, bucket)
	initImmutable(t, st)
	locks := st.(blob.Retainer)
	content := noise(1, 2<<20)
	// The first backup was made long ago, when objects were kept for an hour.
	r := mustOpen(t, st)
	soon := time.Now().Add(time.Hour).Truncate(time.Second)
	locks.SetRetention(func(string) time.Time { return soon })
	s, err := r.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Disk(bg, int64(len(content)), "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(len(content) / testChunk) {
		if _, err := w.Put(bg, i, cut(content, i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.flush(bg); err != nil {
		t.Fatal(err)
	}
	if err := s.writeIndex(bg); err != nil {
		t.Fatal(err)
	}
	s.Abort(bg)
	p, err := backup(bg, mustOpen(t, st), "web01", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if p.ImmutableUntil == nil || time.Until(*p.ImmutableUntil) < twoWeeks-time.Hour {
		t.Fatalf("promised until %v", p.ImmutableUntil)
	}
	packs := 0
	for o, err := range st.List(bg, "") {
		if err != nil {
			t.Fatal(err)
		}
		until, err := locks.RetainedUntil(bg, o.Name)
		if err != nil {
			t.Fatal(err)
		}
		if kept(o.Name) && until.Before(*p.ImmutableUntil) {
			t.Errorf("%s is kept until %v, the point until %v", o.Name, until, p.ImmutableUntil)
		}
		if strings.HasPrefix(o.Name, packPrefix) {
			packs++
		}
	}
	if packs == 0 {
		t.Error("no pack")
	}
	// What vacuum may not delete yet stays and is counted.
	r = mustOpen(t, st)
	if err := r.DeletePoint(bg, "web01", p.ID); !errors.Is(err, fault.ErrLocked) || !strings.Contains(err.Error(), "immutable until") {
		t.Errorf("delete: %v", err)
	}
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Errorf("vacuum: %v", err)
	}
	if got, err := readBack(mustOpen(t, st), p, FetchOptions{}); err != nil || !bytes.Equal(got, content) {
		t.Errorf("after vacuum: %v", err)
	}
}

// Where the store keeps nothing itself, the promise is still in the point.
func TestImmutableInAnyStore(t *testing.T) {
	st := mem.New()
	initImmutable(t, st)
	r := mustOpen(t, st)
	if r.ImmutableFor() != twoWeeks {
		t.Errorf("immutable for %v", r.ImmutableFor())
	}
	content := noise(1, 1<<20)
	p, err := backup(bg, r, "web01", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	var ie *ImmutableError
	if err := r.DeletePoint(bg, "web01", p.ID); !errors.As(err, &ie) || time.Until(ie.Until) < twoWeeks-time.Minute {
		t.Errorf("delete: %v", err)
	}
	if _, err := readBack(mustOpen(t, st), p, FetchOptions{}); err != nil {
		t.Error(err)
	}
	// A bucket that could keep objects and was not made for it is refused.
	g := s3test.Start(t)
	err = Init(bg, bucketAt(t, g.Endpoint, g.Bucket(t)), InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap, ImmutableFor: twoWeeks})
	if !errors.Is(err, fault.ErrUnsupported) || !strings.Contains(err.Error(), "Object Lock") {
		t.Errorf("init: %v", err)
	}
}

func TestGeneration(t *testing.T) {
	for _, now := range []time.Time{time.Unix(0, 0), time.Unix(1, 0), time.Unix(864000, 0), time.Unix(1_800_000_000, 0)} {
		g := generation(now)
		if g.Before(now) || g.Sub(now) >= lockGeneration || !generation(g).Equal(g) {
			t.Errorf("%v: %v", now, g)
		}
	}
}
