package s3

import (
	"errors"
	"io"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/s3/s3test"
	"github.com/backstay/backstay/internal/fault"
)

func TestRetention(t *testing.T) {
	g := s3test.Start(t)
	if can, err := open(t, "s3://"+g.Endpoint+"/"+g.Bucket(t), nil).Retains(t.Context()); can || !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("a bucket without Object Lock: %v, %v", can, err)
	}
	bucket := g.LockedBucket(t)
	st := open(t, "s3://"+g.Endpoint+"/"+bucket+"/site", nil)
	if can, err := st.Retains(t.Context()); !can || err != nil {
		t.Fatal(can, err)
	}
	until := time.Now().Add(24 * time.Hour).Truncate(time.Second)
	st.SetRetention(func(name string) time.Time {
		if name == "loose" {
			return time.Time{}
		}
		return until
	})
	for _, name := range []string{"kept", "loose"} {
		for range 2 {
			r, n := blobtest.Body([]byte("hello"))
			if err := st.Put(t.Context(), name, r, n); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got, err := st.RetainedUntil(t.Context(), "kept"); err != nil || !got.Equal(until) {
		t.Errorf("kept until %v, %v: want %v", got, err, until)
	}
	if got, err := st.RetainedUntil(t.Context(), "loose"); err != nil || !got.IsZero() {
		t.Errorf("what is not kept is until %v, %v", got, err)
	}
	if _, err := st.RetainedUntil(t.Context(), "absent"); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("what is not there: %v", err)
	}
	// Later is later, and earlier changes nothing.
	later := until.Add(time.Hour)
	for _, to := range []time.Time{later, until} {
		if err := st.Retain(t.Context(), "kept", to); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := st.RetainedUntil(t.Context(), "kept"); err != nil || !got.Equal(later) {
		t.Errorf("extended to %v, %v: want %v", got, err, later)
	}
	// What is deleted is gone from sight; of what is not kept nothing is left.
	for _, name := range []string{"kept", "loose"} {
		if err := st.Delete(t.Context(), name); err != nil {
			t.Errorf("delete %s: %v", name, err)
		}
	}
	if names, err := blobtest.Names(t.Context(), st, ""); err != nil || len(names) > 0 {
		t.Errorf("listed %v, %v", names, err)
	}
	left := map[string]int{}
	for o := range g.Client(t).ListObjectsIter(t.Context(), bucket, minio.ListObjectsOptions{Recursive: true, WithVersions: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		if !o.IsDeleteMarker {
			left[o.Key]++
		}
	}
	if left["site/loose"] != 0 || left["site/kept"] == 0 {
		t.Errorf("versions left: %v", left)
	}
}

// The past is there whatever was done since, and cannot be changed.
func TestAsOf(t *testing.T) {
	g := s3test.Start(t)
	st := open(t, "s3://"+g.Endpoint+"/"+g.LockedBucket(t)+"/site", nil)
	put := func(name, body string) {
		t.Helper()
		r, n := blobtest.Body([]byte(body))
		if err := st.Put(t.Context(), name, r, n); err != nil {
			t.Fatal(err)
		}
	}
	put("a", "first")
	put("b", "hidden before")
	if err := st.Delete(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	put("d/e", "deeper")
	time.Sleep(1100 * time.Millisecond)
	then := time.Now()
	time.Sleep(2100 * time.Millisecond)
	put("a", "overwritten")
	put("b", "back")
	put("c", "new")
	if err := st.Delete(t.Context(), "d/e"); err != nil {
		t.Fatal(err)
	}
	old, err := st.AsOf(t.Context(), then)
	if err != nil {
		t.Fatal(err)
	}
	if names, err := blobtest.Names(t.Context(), old, ""); err != nil || len(names) != 2 || names[0] != "a" || names[1] != "d/e" {
		t.Errorf("listed %v, %v", names, err)
	}
	if names, err := blobtest.Names(t.Context(), old, "d/"); err != nil || len(names) != 1 {
		t.Errorf("listed %v, %v", names, err)
	}
	for name, want := range map[string]string{"a": "first", "d/e": "deeper"} {
		p := make([]byte, 20)
		if n, err := old.ReadAt(t.Context(), name, p, 0); err != io.EOF || string(p[:n]) != want {
			t.Errorf("%s: %q, %v", name, p[:n], err)
		}
		if n, err := old.Size(t.Context(), name); err != nil || n != int64(len(want)) {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
	for _, name := range []string{"b", "c"} {
		if _, err := old.Size(t.Context(), name); !errors.Is(err, fault.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r, n := blobtest.Body(nil)
	for what, err := range map[string]error{"put": old.Put(t.Context(), "a", r, n), "create": old.Create(t.Context(), "z", r, n), "delete": old.Delete(t.Context(), "a")} {
		if !errors.Is(err, fault.ErrReadOnly) {
			t.Errorf("%s: %v", what, err)
		}
	}
	var _ blob.Store = old
}
