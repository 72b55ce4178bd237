package netlab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// request is what `cairn net lab` asks of a running lab; a line of JSON.
type request struct {
	Do   string `json:"do"` // cut, silence, drop-data, narrow, heal, enter
	What string `json:"what"`
}

// answer to a request; another line.
type answer struct {
	Err       string      `json:"err,omitempty"`
	Kind      status.Kind `json:"kind,omitempty"`
	Namespace string      `json:"namespace,omitempty"` // enter: path of the node's
	Meta      string      `json:"meta,omitempty"`      // enter: of the cluster
}

const askWait = 10 * time.Second

func socket(dir string) string { return filepath.Join(dir, "lab.sock") }

// Serve carries out what other processes ask of the lab until ctx ends. The
// cluster may be nil.
func (l *Lab) Serve(ctx context.Context, c *Cluster) error {
	if err := os.Remove(socket(l.cfg.Dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	s, err := net.Listen("unix", socket(l.cfg.Dir))
	if err != nil {
		return fmt.Errorf("cannot take orders: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()
	for {
		conn, err := s.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		l.answer(conn, c)
	}
}

// answer serves one caller; they come one at a time.
func (l *Lab) answer(conn net.Conn, c *Cluster) {
	defer func() { _ = conn.Close() }() // the answer was written or the caller is gone
	if conn.SetDeadline(time.Now().Add(askWait)) != nil {
		return
	}
	var r request
	if json.NewDecoder(bufio.NewReader(conn)).Decode(&r) != nil {
		return
	}
	var a answer
	var err error
	if r.Do == "enter" {
		n := l.nodes[r.What]
		if n == nil {
			err = l.unknown(r.What)
		} else {
			a.Namespace = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(n.fd))
		}
		if c != nil {
			a.Meta = c.Meta()
		}
	} else {
		err = l.Do(r.Do, r.What)
	}
	if err != nil {
		a.Err, a.Kind = err.Error(), status.Of(err)
	}
	_ = json.NewEncoder(conn).Encode(a) // a caller that is gone needs none
}

func (l *Lab) unknown(what string) error {
	return status.Errorf(status.NotFound, "the lab has no %q: it has %s, and links like host-1:spine-1", what, strings.Join(l.names(), ", "))
}

func (l *Lab) names() (out []string) {
	for _, n := range l.Topology.Nodes {
		out = append(out, n.Name)
	}
	return out
}

// Do cuts or heals a part of the lab by name: a link "host-1:spine-2", a spine,
// or a host.
//
//	cut        links lose their carrier: one, or all of a node
//	silence    a spine drops all it gets and sends; its links stay up
//	drop-data  a spine drops what it should pass on; routing sees nothing
//	narrow     a spine drops long packets it should pass on
//	heal       undoes all of it; "all" for the whole lab
func (l *Lab) Do(what, part string) error {
	if !slices.Contains([]string{"cut", "silence", "drop-data", "narrow", "heal"}, what) {
		return status.Errorf(status.Invalid, "%q is nothing a lab can do: cut, silence, drop-data, narrow or heal", what)
	}
	links, spines := l.parts(part)
	if len(links) == 0 {
		return l.unknown(part)
	}
	if len(spines) == 0 && what != "cut" && what != "heal" {
		return status.Errorf(status.Invalid, "only a spine can %s, %s is none", what, part)
	}
	var errs []error
	for _, s := range spines {
		switch what {
		case "silence":
			errs = append(errs, l.Silence(s))
		case "drop-data":
			errs = append(errs, l.DropData(s))
		case "narrow":
			errs = append(errs, l.Narrow(s))
		case "heal":
			errs = append(errs, l.Heal(s))
		}
	}
	for _, k := range links {
		switch what {
		case "cut":
			errs = append(errs, l.LinkDown(k[0], k[1]))
		case "heal":
			errs = append(errs, l.LinkUp(k[0], k[1]))
		}
	}
	return errors.Join(errs...)
}

// parts are the links, as (host, spine), and the spines of a name.
func (l *Lab) parts(name string) (links [][2]int, spines []int) {
	host, spine, isLink := strings.Cut(name, ":")
	for s := 1; s <= l.cfg.Spines; s++ {
		sn := fmt.Sprintf("spine-%d", s)
		if name == sn || name == "all" {
			spines = append(spines, s)
		}
		for h := 1; h <= l.cfg.Hosts; h++ {
			hn := fmt.Sprintf("host-%d", h)
			if name == "all" || name == sn || name == hn || isLink && host == hn && spine == sn {
				links = append(links, [2]int{h, s})
			}
		}
	}
	return links, spines
}

// Ask has the lab that runs in a directory do something.
func Ask(ctx context.Context, dir, do, what string) error {
	_, err := ask(ctx, dir, request{do, what})
	return err
}

// Enter returns the network namespace of a node of the lab in a directory, as a
// path, and the metadata nodes of its cluster ("" without one).
func Enter(ctx context.Context, dir, node string) (namespace, meta string, err error) {
	a, err := ask(ctx, dir, request{"enter", node})
	return a.Namespace, a.Meta, err
}

func ask(ctx context.Context, dir string, r request) (a answer, err error) {
	d := net.Dialer{Timeout: askWait}
	conn, err := d.DialContext(ctx, "unix", socket(dir))
	if err != nil {
		return a, status.Errorf(status.Unavailable, "no lab runs in %s: `cairn net lab up --dir %s` starts one", dir, dir)
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := conn.SetDeadline(time.Now().Add(askWait)); err != nil {
		return a, err
	}
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return a, fmt.Errorf("the lab takes no order: %w", err)
	}
	if err := json.NewDecoder(conn).Decode(&a); err != nil {
		return a, fmt.Errorf("the lab gives no answer: %w", err)
	}
	return a, status.New(a.Kind, a.Err)
}
