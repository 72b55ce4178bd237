package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// formatVersion of a node's directory:
//
//	node.json    record: written first, replaced as a whole
//	lock         flock of the running process
//	raft.db      raft's log and vote (raft-boltdb): the truth, synced
//	snapshots/   raft's snapshots, the newest few
//	state/       Badger: a cache of the two above; may be deleted while stopped
//
// Version 1 had a log and a vote without checksums; 2 is the first with them.
const formatVersion = 2

// record says whose directory this is, and how far the node may be trusted in
// elections (see voter).
type record struct {
	Format    int    `json:"format"`
	ID        string `json:"id"`
	Cluster   string `json:"cluster,omitempty"`
	Joined    bool   `json:"joined"`               // raft has been started, or may be
	NeedIndex uint64 `json:"need_index,omitempty"` // no vote before this much of the log is here
	AboveTerm uint64 `json:"above_term,omitempty"` // no vote up to this term
	Life      string `json:"life,omitempty"`       // the id it was, or is to be, added under
	Added     bool   `json:"added,omitempty"`      // a leader has written to it: its log must be there from now on
	Removed   bool   `json:"removed,omitempty"`    // for good
	Lost      bool   `json:"lost,omitempty"`       // its memory was emptied: it never begins a new cluster
	Doubt     string `json:"doubt,omitempty"`      // what to empty at the next start; see heal.go
	Members   []Peer `json:"members,omitempty"`    // all nodes, as last heard
	Sum       string `json:"sum,omitempty"`        // crc32c of the rest, 8 hex digits
}

// nodeDir is the locked directory of one node.
type nodeDir struct {
	path string
	lock *os.File

	mu  sync.Mutex // guards rec once the node runs
	rec record
}

func (d *nodeDir) file(name string) string { return filepath.Join(d.path, name) }

// openDir locks the directory and reads or begins its record.
func openDir(path, id, cluster string) (*nodeDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("creating the metadata directory: %w", err)
	}
	d := &nodeDir{path: path}
	lock, err := os.OpenFile(d.file("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the metadata directory: %w", err)
	}
	d.lock = lock
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(status.Errorf(status.Held, "the metadata directory %s is in use by another process: stop it, or use another directory", path), lock.Close())
	}
	if err := d.load(id, cluster); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return d, nil
}

func (d *nodeDir) load(id, cluster string) error {
	b, err := os.ReadFile(d.file("node.json"))
	if errors.Is(err, fs.ErrNotExist) {
		for _, name := range []string{"raft.db", "snapshots", "state"} {
			if _, err := os.Lstat(d.file(name)); err == nil {
				return status.Errorf(status.Corrupt, "%s holds %s but no node.json: restore that file, or move the directory away and this node gets everything from the others", d.path, name)
			}
		}
		d.rec = record{Format: formatVersion, ID: id, Cluster: cluster}
		return d.save()
	}
	if err != nil {
		return fmt.Errorf("reading the metadata directory: %w", err)
	}
	if err := json.Unmarshal(b, &d.rec); err != nil {
		return status.Errorf(status.Corrupt, "%s is damaged (%w): restore it, or move the directory away and this node gets everything from the others", d.file("node.json"), err)
	}
	switch {
	case d.rec.Format != formatVersion:
		return status.Errorf(status.Unsupported, "the metadata directory %s has format version %d and this program reads version %d: use the program that wrote it", d.path, d.rec.Format, formatVersion)
	case !d.rec.sound():
		return status.Errorf(status.Corrupt, "%s is damaged (its checksum is wrong): restore it, or move the directory away and this node gets everything from the others", d.file("node.json"))
	case d.rec.ID != id:
		return status.Errorf(status.Conflict, "the metadata directory %s belongs to node %s, not to %s: use that node's own directory", d.path, d.rec.ID, id)
	case cluster != "" && d.rec.Cluster != "" && d.rec.Cluster != cluster:
		return status.Errorf(status.Conflict, "the metadata directory %s belongs to cluster %s, not to %s: use another directory", d.path, d.rec.Cluster, cluster)
	}
	return nil
}

// sound compares the record with its checksum.
func (r record) sound() bool {
	got, err := r.seal()
	return err == nil && got.Sum == r.Sum
}

// seal returns the record with its checksum.
func (r record) seal() (record, error) {
	r.Sum = ""
	b, err := json.Marshal(r)
	r.Sum = fmt.Sprintf("%08x", crc32.Checksum(b, castagnoli))
	return r, err
}

// save replaces the record; after it, a crash leaves the new one.
func (d *nodeDir) save() (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing %s: %w", d.file("node.json"), err)
		}
	}()
	if d.rec, err = d.rec.seal(); err != nil {
		return err
	}
	b, err := json.MarshalIndent(d.rec, "", "  ")
	if err != nil {
		return err
	}
	tmp := d.file("node.json.new")
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, d.file("node.json")); err != nil {
		return err
	}
	p, err := os.Open(d.path)
	if err != nil {
		return err
	}
	return errors.Join(p.Sync(), p.Close())
}

// record returns the record as it is.
func (d *nodeDir) record() record {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.rec
}

func (d *nodeDir) close() error { return unlock(d.lock) }

// unlock lets a lock go, and not only this descriptor of it: a process that is
// just being started has a copy until it runs.
func unlock(lock *os.File) error {
	return errors.Join(os.NewSyscallError("flock", unix.Flock(int(lock.Fd()), unix.LOCK_UN)), lock.Close())
}
