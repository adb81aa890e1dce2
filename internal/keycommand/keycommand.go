// Package keycommand closes and opens a repository's master key with a program
// of the user's: the door to key management services and hardware modules.
//
// The program is run as
//
//	PROG ARG… wrap        plaintext on stdin, wrapped bytes on stdout
//	PROG ARG… unwrap      wrapped bytes on stdin, plaintext on stdout
//
// with the repository's id in BACKSTAY_REPOSITORY_ID. No secret is in its
// arguments or its environment. It succeeds by exit status 0 and nothing else
// on stdout; its stderr is the user's to see. docs/design/keys.md says more.
package keycommand

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
	"unicode"
)

// timeLimit leaves somebody the time to touch a token.
const timeLimit = 2 * time.Minute

// maxOutput is the most that a program may write to stdout, in bytes.
const maxOutput = 64 << 10

// A Command is a program and its arguments. It is safe for concurrent use.
type Command struct {
	args   []string
	stderr io.Writer
	env    []string
	limit  time.Duration
}

// Parse reads a command line: words between spaces, quotes (" or ') around what
// has spaces. There is no shell and nothing is expanded. What the program says
// on its stderr goes to stderr.
func Parse(line string, stderr io.Writer) (*Command, error) {
	args, err := split(line)
	if err != nil {
		return nil, err
	}
	if len(args) == 0 {
		return nil, errors.New("the key command is empty")
	}
	c := &Command{args: args, stderr: stderr, limit: timeLimit}
	for _, v := range os.Environ() {
		// A passphrase for us is none of its business.
		if name, _, _ := strings.Cut(v, "="); !strings.HasPrefix(name, "BACKSTAY_") {
			c.env = append(c.env, v)
		}
	}
	return c, nil
}

func split(line string) (words []string, err error) {
	var word strings.Builder
	var quote rune
	in := false
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '"' || r == '\'':
			quote, in = r, true
		case unicode.IsSpace(r):
			if in {
				words = append(words, word.String())
				word.Reset()
			}
			in = false
		default:
			word.WriteRune(r)
			in = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("the key command has a %c without its second", quote)
	}
	if in {
		words = append(words, word.String())
	}
	return words, nil
}

// String is the program's name; arguments are left out, which may say where a
// secret lies.
func (c *Command) String() string { return c.args[0] }

// Wrap closes plain for the repository with this id.
func (c *Command) Wrap(ctx context.Context, repo string, plain []byte) ([]byte, error) {
	return c.run(ctx, "wrap", repo, plain)
}

// Unwrap opens what Wrap made. What it is given comes from the repository and
// may be anything.
func (c *Command) Unwrap(ctx context.Context, repo string, wrapped []byte) ([]byte, error) {
	return c.run(ctx, "unwrap", repo, wrapped)
}

func (c *Command) run(ctx context.Context, verb, repo string, in []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.args[0], append(append([]string(nil), c.args[1:]...), verb)...)
	cmd.Env = append(append([]string(nil), c.env...), "BACKSTAY_REPOSITORY_ID="+repo)
	out := &limited{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), out, c.stderr
	// A grandchild may hold the pipes open: it is not waited for.
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	switch {
	case out.over:
		clear(out.b)
		return nil, fmt.Errorf("key command %s %s: more than %d bytes on stdout", c, verb, maxOutput)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		clear(out.b)
		return nil, fmt.Errorf("key command %s %s: no answer in %s", c, verb, c.limit)
	case err != nil:
		clear(out.b)
		return nil, fmt.Errorf("key command %s %s: %w", c, verb, err)
	}
	return out.b, nil
}

// limited takes the first maxOutput bytes, in memory that does not move, so
// that no copies of a key are left behind.
type limited struct {
	b    []byte
	over bool
}

func (l *limited) Write(p []byte) (int, error) {
	if l.b == nil {
		l.b = make([]byte, 0, maxOutput)
	}
	if len(l.b)+len(p) > maxOutput {
		l.over = true
		return 0, errors.New("too much")
	}
	l.b = append(l.b, p...)
	return len(p), nil
}
