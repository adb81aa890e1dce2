package repo

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/secret"
)

// xorKeeper is a key service of its own, and no good one.
type xorKeeper byte

func (x xorKeeper) Wrap(_ context.Context, repo string, plain []byte) ([]byte, error) {
	out := []byte(repo)
	for _, b := range plain {
		out = append(out, b^byte(x))
	}
	return out, nil
}

func (x xorKeeper) Unwrap(_ context.Context, repo string, wrapped []byte) ([]byte, error) {
	b, ok := bytes.CutPrefix(wrapped, []byte(repo))
	if !ok {
		return nil, errors.New("another repository's")
	}
	out := []byte{}
	for _, c := range b {
		out = append(out, c^byte(x))
	}
	return out, nil
}

func pass(s string) Key { return Key{Passphrase: secret.New([]byte(s))} }

func newPass(s, label string) NewKey {
	return NewKey{Label: label, Passphrase: secret.New([]byte(s)), KDF: cheap}
}

func mustRing(t testing.TB, st blob.Store, k Key) *Keyring {
	t.Helper()
	ring, err := OpenKeyring(bg, st, k)
	if err != nil {
		t.Fatal(err)
	}
	return ring
}

func mustAdd(t testing.TB, ring *Keyring, nk NewKey) KeyInfo {
	t.Helper()
	in, err := ring.Add(bg, nk)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func opensWith(st blob.Store, k Key) bool {
	_, err := Open(bg, st, k)
	return err == nil
}

// Every kind of key reads what was backed up under another, and the list says
// what each of them is.
func TestEveryKindOfKeyOpens(t *testing.T) {
	st, r := newRepo(t)
	content := text(1, 3*testChunk)
	p := mustBackup(t, r, "web01", content, nil, nil)
	ring := mustRing(t, st, testKey)
	id, _ := age.GenerateX25519Identity()
	code := secret.NewRecovery()
	typed := strings.ToLower(strings.ReplaceAll(secret.PrintRecovery(code), "-", " "))
	made := map[string]KeyInfo{
		"bob's":   mustAdd(t, ring, newPass("battery staple", "bob's")),
		"age":     mustAdd(t, ring, NewKey{Label: "age", Recipient: id.Recipient(), Identities: []age.Identity{id}}),
		"kit":     mustAdd(t, ring, NewKey{Label: "kit", Recovery: code, KDF: cheap}),
		"service": mustAdd(t, ring, NewKey{Label: "service", Keeper: xorKeeper(7)}),
	}
	for label, k := range map[string]Key{"bob's": pass("battery staple"), "age": {Identities: []age.Identity{id}}, "kit": pass(typed), "service": {Keeper: xorKeeper(7)}} {
		again, err := Open(bg, st, k)
		if err != nil {
			t.Fatalf("%s: %v", label, err)
		}
		mustRead(t, again, p, content)
		ring := mustRing(t, st, k)
		if ring.Opened() != made[label].ID {
			t.Errorf("%s: opened by %s", label, ring.Opened())
		}
		all, err := ring.List(bg)
		if err != nil || len(all) != 5 {
			t.Fatalf("%v, %v", all, err)
		}
		for _, in := range all {
			if in.State != KeySound || !in.Proven || in.Opened != (in.ID == made[label].ID) || in.Created == nil {
				t.Errorf("opened with %s: %+v", label, in)
			}
			if m, ok := made[in.Label]; ok && (m.ID != in.ID || m.Kind != in.Kind) {
				t.Errorf("%+v is listed as %+v", m, in)
			}
		}
	}
	for name, k := range map[string]Key{"another passphrase": pass("x"), "another service": {Keeper: xorKeeper(8)}, "nothing": {}, "another recovery key": {Passphrase: secret.NewRecovery()}} {
		if _, err := Open(bg, st, k); !errors.Is(err, fault.ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	keyless, err := OpenKeyless(bg, st)
	if err != nil {
		t.Fatal(err)
	}
	c, err := keyless.KeyCounts(bg)
	if err != nil || c != (KeyCounts{2, 1, 1, 1}) {
		t.Errorf("counted %+v, %v", c, err)
	}
	all, err := keyless.Keys(bg)
	if err != nil || len(all) != 5 {
		t.Errorf("%d keys, %v", len(all), err)
	}
	for _, in := range all {
		if in.Label != "" || in.Created != nil || in.State != KeyUnchecked {
			t.Errorf("without a key one sees %+v", in)
		}
	}
	// What is sealed is written as base64, in which chance finds three letters
	// once in some hundred runs, and no apostrophe.
	for o := range st.List(bg, keysPrefix) {
		if b, _ := readObject(bg, st, o.Name); bytes.Contains(b, []byte("bob's")) || bytes.Contains(b, []byte("service")) {
			t.Errorf("a label is in the clear: %s", b)
		}
	}
}

// A removed key opens nothing any more and the others do; the last one stays,
// whatever is said.
func TestTheLastKeyStays(t *testing.T) {
	st, _ := newRepo(t)
	ring := mustRing(t, st, testKey)
	first := ring.Opened()
	if err := ring.Remove(bg, first, true); !errors.Is(err, ErrLastKey) {
		t.Fatalf("the only one: %v", err)
	}
	bob := mustAdd(t, ring, newPass("two", "bob"))
	if err := ring.Remove(bg, first, false); err != nil {
		t.Fatal(err)
	}
	if opensWith(st, testKey) || !opensWith(st, pass("two")) {
		t.Error("the wrong one was removed")
	}
	if err := mustRing(t, st, pass("two")).Remove(bg, bob.ID, true); !errors.Is(err, ErrLastKey) {
		t.Errorf("the only one left: %v", err)
	}
	if err := ring.Remove(bg, first, false); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("one that is gone: %v", err)
	}
}

// A recipient whose identity nobody showed may be a typing mistake: it is not
// left alone without being asked for.
func TestAnUnprovenRecipientIsNotLeftAlone(t *testing.T) {
	st, _ := newRepo(t)
	ring := mustRing(t, st, testKey)
	id, _ := age.GenerateX25519Identity()
	if in := mustAdd(t, ring, NewKey{Recipient: id.Recipient()}); in.Proven {
		t.Error("nobody proved it")
	}
	if err := ring.Remove(bg, ring.Opened(), false); !errors.Is(err, ErrUnproven) {
		t.Fatalf("%v", err)
	}
	if _, err := ring.Rotate(bg, ring.Opened(), NewKey{Recipient: id.Recipient()}, false); !errors.Is(err, ErrUnproven) {
		t.Fatalf("rotated to it: %v", err)
	}
	if all, _ := ring.List(bg); len(all) != 2 {
		t.Errorf("a refused rotation left %+v", all)
	}
	// Opened with the identity, it is proven enough.
	byAge := mustRing(t, st, Key{Identities: []age.Identity{id}})
	all, _ := byAge.List(bg)
	for _, in := range all {
		if in.Kind == KindPassphrase {
			if err := byAge.Remove(bg, in.ID, false); err != nil {
				t.Error(err)
			}
		}
	}
	if !opensWith(st, Key{Identities: []age.Identity{id}}) || opensWith(st, testKey) {
		t.Error("the wrong one was removed")
	}
}

// Whoever can write to the store can plant keys. They do not count, cannot be
// taken for ours, and do not keep ours from opening.
func TestPlantedKeys(t *testing.T) {
	st, r := newRepo(t)
	id, _ := age.GenerateX25519Identity()
	ring := mustRing(t, st, testKey)
	mustAdd(t, ring, NewKey{Recipient: id.Recipient(), Identities: []age.Identity{id}})
	// Another master key for our recipient, under the first and the last name.
	w, err := seal.WrapAge(seal.Key{1}, r.id, id.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	evil := wrappedKey{Format: 1, Kind: KindAge, Recipient: id.Recipient().String(), Wrapped: hex.EncodeToString(w)}
	for _, name := range []string{keysPrefix + "0000000000000000", keysPrefix + "ffffffffffffffff"} {
		other, err := seal.Derive(seal.Key{1}, r.id)
		if err != nil {
			t.Fatal(err)
		}
		b, err := object.EncodeSealed(evil, &other.Meta, object.Binding{Repo: r.id, Name: name}, []byte(`{"label":"alice","proven":true}`))
		if err != nil {
			t.Fatal(err)
		}
		if err := put(bg, st, name, b); err != nil {
			t.Fatal(err)
		}
	}
	if !opensWith(st, Key{Identities: []age.Identity{id}}) {
		t.Error("a planted key keeps the identity out")
	}
	// One of ours under another name, and one without the sealed part.
	for o := range st.List(bg, keysPrefix) {
		if b, _ := readObject(bg, st, o.Name); bytes.Contains(b, []byte("argon2id")) {
			put(bg, st, keysPrefix+"1111111111111111", b)
			var w wrappedKey
			if err := object.Decode("", b, &w); err != nil {
				t.Fatal(err)
			}
			bare, err := object.Encode(w)
			if err != nil {
				t.Fatal(err)
			}
			put(bg, st, keysPrefix+"2222222222222222", bare)
			break
		}
	}
	states := map[string]string{"0000000000000000": KeyForeign, "1111111111111111": KeyForeign, "2222222222222222": KeyUnsigned, "ffffffffffffffff": KeyForeign}
	all, err := ring.List(bg)
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range all {
		want, planted := states[in.ID]
		if !planted {
			want = KeySound
		}
		if in.State != want || planted && in.Label != "" {
			t.Errorf("%+v, want %s", in, want)
		}
	}
	for planted := range states {
		if planted == "2222222222222222" {
			continue // it may be an old one of ours
		}
		if err := ring.Remove(bg, planted, false); err != nil {
			t.Errorf("planted key %s: %v", planted, err)
		}
	}
}

// A rotation that stops anywhere leaves the old key or the new one, and one
// that was told done leaves only the new one.
func TestRotateSurvivesCrash(t *testing.T) {
	for n := 0; ; n += stride() {
		st := mem.New()
		mustInit(t, st)
		ring, err := OpenKeyring(bg, crashAfter(n, st), testKey)
		if err == nil {
			_, err = ring.Rotate(bg, ring.Opened(), newPass("new", ""), false)
		}
		old, fresh := opensWith(st, testKey), opensWith(st, pass("new"))
		if !old && !fresh {
			t.Fatalf("stopped after %d operations: nothing opens it", n)
		}
		if err == nil {
			if old || !fresh {
				t.Fatalf("rotated: old %v, new %v", old, fresh)
			}
			return
		}
	}
}

// Two who each remove what the other relies on do not remove both.
func TestTwoRemovalsAtOnce(t *testing.T) {
	st, _ := newRepo(t)
	a := mustRing(t, st, testKey)
	b := mustAdd(t, a, newPass("two", ""))
	bRing := mustRing(t, st, pass("two"))
	// b removes a's key just before a's removal of b's key is carried out.
	a.st = &beforeDelete{Store: st, do: func() {
		if err := bRing.Remove(bg, a.opened, false); err != nil {
			t.Error(err)
		}
	}}
	if err := a.Remove(bg, b.ID, false); !errors.Is(err, ErrLastKey) {
		t.Errorf("%v", err)
	}
	if !opensWith(st, pass("two")) {
		t.Error("nothing opens it")
	}
}

type beforeDelete struct {
	blob.Store
	do func()
}

func (s *beforeDelete) Delete(ctx context.Context, name string) error {
	if s.do != nil {
		do := s.do
		s.do = nil
		do()
	}
	return s.Store.Delete(ctx, name)
}

// A key that is rotated while somebody opens the repository is neither damage
// nor a reason not to get in with the one in its place.
func TestAKeyRotatedWhileTheRepositoryIsOpened(t *testing.T) {
	for give, want := range map[string]error{"new": nil, "neither": fault.ErrKey} {
		st, _ := newRepo(t)
		ring := mustRing(t, st, testKey)
		late := &beforeKeyRead{Store: st, do: func() {
			if _, err := ring.Rotate(bg, ring.opened, newPass("new", ""), false); err != nil {
				t.Error(err)
			}
		}}
		if _, err := Open(bg, late, pass(give)); !errors.Is(err, want) {
			t.Errorf("with %q: %v, not %v", give, err, want)
		}
	}
}

type beforeKeyRead struct {
	blob.Store
	do func()
}

func (s *beforeKeyRead) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if s.do != nil && strings.HasPrefix(name, keysPrefix) {
		do := s.do
		s.do = nil
		do()
	}
	return s.Store.ReadAt(ctx, name, p, off)
}

// What does not give the key back is never stored.
func TestAKeyIsProvenBeforeItIsStored(t *testing.T) {
	st, _ := newRepo(t)
	ring := mustRing(t, st, testKey)
	for name, nk := range map[string]NewKey{
		"forgetful service": {Keeper: brokenKeeper{}},
		"mirror":            {Keeper: xorKeeper(0)},
		"nothing":           {},
		"long label":        newPass("x", strings.Repeat("x", 65)),
		"unprintable label": newPass("x", "a\x1b[2J"),
		"refused":           {Passphrase: password, KDF: cheap, Before: func(KeyObjects) error { return errors.New("no paper") }},
		"cost out of range": {Passphrase: password, KDF: KDF{Passes: 1, MemoryKiB: 1 << 30, Threads: 1}},
	} {
		if _, err := ring.Add(bg, nk); err == nil {
			t.Errorf("%s: it was added", name)
		}
	}
	if all, _ := ring.List(bg); len(all) != 1 {
		t.Errorf("stored: %+v", all)
	}
}

type brokenKeeper struct{ xorKeeper }

func (brokenKeeper) Unwrap(context.Context, string, []byte) ([]byte, error) {
	return nil, errors.New("forgotten")
}

// The two objects of a recovery kit and the key in it bring a repository back
// whose small objects were all lost.
func TestARecoveryKitOpensWithItsObjects(t *testing.T) {
	st := mem.New()
	code := secret.NewRecovery()
	var kit KeyObjects
	err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap, Keys: []NewKey{{Recovery: code, KDF: cheap, Before: func(k KeyObjects) error {
		for o := range st.List(bg, "") {
			t.Errorf("%s is stored before the kit is printed", o.Name)
		}
		kit = k
		return nil
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	content := noise(3, testChunk)
	p := mustBackup(t, mustOpen(t, st), "web01", content, nil, nil)
	for o := range st.List(bg, "keys/") {
		st.Delete(bg, o.Name)
	}
	st.Delete(bg, configName)
	put(bg, st, configName, kit.Config)
	put(bg, st, keysPrefix+kit.Key, kit.Wrapped)
	r, err := Open(bg, st, pass(secret.PrintRecovery(code)))
	if err != nil {
		t.Fatal(err)
	}
	mustRead(t, r, p, content)
}

// A repository that could not be made leaves nothing that keeps the next try.
func TestInitThatFailsLeavesNoKeys(t *testing.T) {
	st := mem.New()
	err := Init(bg, st, InitOptions{Passphrase: password, KDF: cheap, Keys: []NewKey{{Recovery: secret.NewRecovery(), KDF: cheap, Before: func(KeyObjects) error { return errors.New("no paper") }}}})
	if err == nil {
		t.Fatal("it was made")
	}
	for o := range st.List(bg, "") {
		t.Errorf("%s is left", o.Name)
	}
}

// Whatever is printed of a ring, a key or an error of them shows no secret.
func TestNoKeyShows(t *testing.T) {
	st, _ := newRepo(t)
	ring := mustRing(t, st, testKey)
	nk := newPass("battery staple", "bob")
	_, err := OpenKeyring(bg, st, pass("hunter2"))
	for _, out := range []string{fmt.Sprintf("%v %+v %#v", ring, *ring, ring), fmt.Sprintf("%v %+v %#v", nk, nk, nk), fmt.Sprintf("%v %#v", testKey, testKey), err.Error()} {
		for _, s := range []string{"hunter2", "battery", "98 97 116", "0x62, 0x61, 0x74", hex.EncodeToString(ring.master[:]), fmt.Sprint(ring.master[:])[1:20], fmt.Sprintf("%#v", ring.master[:])[8:30]} {
			if strings.Contains(out, s) {
				t.Errorf("%q shows in %q", s, out)
			}
		}
	}
}

// Nobody could name one of two keys by a label that both have; keys without one
// are named by their ids.
func TestALabelIsOneKeys(t *testing.T) {
	st := mem.New()
	mustInit(t, st)
	ring, err := OpenKeyring(bg, st, testKey)
	if err != nil {
		t.Fatal(err)
	}
	bob, err := ring.Add(bg, newPass("one", "bob"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ring.Add(bg, newPass("two", "bob")); !errors.Is(err, fault.ErrExists) || !strings.Contains(err.Error(), bob.ID) {
		t.Errorf("%v, want it refused and %s named", err, bob.ID)
	}
	for range 2 {
		if _, err := ring.Add(bg, newPass("three", "")); err != nil {
			t.Errorf("without a label: %v", err)
		}
	}
	next, err := ring.Rotate(bg, bob.ID, newPass("four", "bob"), false)
	if err != nil || next.Label != "bob" {
		t.Errorf("rotate keeps the label: %+v, %v", next, err)
	}
}
