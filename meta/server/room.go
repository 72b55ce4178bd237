package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// A disk that others fill to the last byte ends no node. Badger writes to mapped
// files, and the first write to a page that finds no block is a SIGBUS; raft ends
// the process when it cannot write down a term. So
//
//   - blocks are put aside while there are some: for all of Badger's memtable,
//     and for what raft's log may grow by;
//   - with less than freeLeast a node stores no commands, takes no snapshot and
//     restores none: nothing follows from it that Badger would write. The others
//     go on, and give it what it has missed;
//   - with less than freeOpen a node does not start.
//
// What is left: a table that Badger is just writing when the last byte goes, from
// freeLeast to nothing within the tenth of a second that takes. The process ends,
// and its next start, once there is room, rebuilds the state.
const (
	freeLeast = 12 << 20
	freeOpen  = 32 << 20
	logAside  = 8 << 20 // behind the end of raft's log
)

// room says whether this node's disk has so many bytes free.
func (s *Server) room(least uint64) error {
	free, err := s.cfg.free(s.cfg.Dir)
	if err != nil {
		return status.Errorf(status.IO, "metadata node %s cannot see its free space: %w", s.cfg.ID, err)
	}
	if free < least {
		return status.Errorf(status.NoSpace, "metadata node %s has %d MiB left on the disk of %s and needs %d: make room there, and it goes on by itself", s.cfg.ID, free>>20, s.cfg.Dir, least>>20)
	}
	return nil
}

func (s *Server) roomToStore() error { return s.room(freeLeast) }

// full reports whether what hangs hangs for room, here or on too many others.
func (s *Server) full() bool { return s.roomToStore() != nil || s.quorumFree.Load() < freeLeast }

// putAside gives blocks to the files that are written next.
func (s *Server) putAside() error {
	if s.roomToStore() != nil {
		return nil
	}
	names, err := filepath.Glob(filepath.Join(s.dir.file("state"), "*.mem"))
	for _, name := range names {
		err = errors.Join(err, aside(name, 0))
	}
	return errors.Join(err, aside(s.dir.file("raft.db"), logAside))
}

// aside gives blocks to all of a file and to so many bytes behind its end, if
// half of those are missing: it costs the file's next sync a commit of the file
// system's journal.
func aside(name string, more int64) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) { // Badger has removed it
		return nil
	}
	if err != nil {
		return fmt.Errorf("putting blocks aside: %w", err)
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil && st.Blocks*512 < st.Size+more/2 {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, st.Size+more)
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSPC) { // as good as it gets
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("putting blocks aside for %s: %w", name, err)
	}
	return errors.Join(err, f.Close())
}
