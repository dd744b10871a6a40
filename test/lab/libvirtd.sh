# libvirtd.sh LAB DAEMON [INSTANCES]: runs libvirt's DAEMON on the lab's folders instead
# of the machine's; with INSTANCES as the first process of a PID namespace, with
# the guests' files there, too.
#
# Runs in a mount namespace of its own, so none of these mounts is seen outside.
# The control groups are hidden: without them libvirt neither makes any (two
# labs would share theirs) nor registers guests with systemd-machined.
set -e
if [ -n "$KVMETER_LAB_HOST" ]; then # it is apart
	echo "$KVMETER_LAB_HOST" >/proc/sys/kernel/hostname
	mount -t sysfs kvmeter-lab /sys # of its network namespace
fi
lab=$1 scratch=/sys/fs/cgroup
umount -R -l $scratch 2>/dev/null || true
mount -t tmpfs kvmeter-lab $scratch
mkdir $scratch/lab
mount --bind "$lab" $scratch/lab

# A folder that the machine does not have gets its mount point in an overlay,
# so that it is not made there.
private() {
	parent=${2%/*}
	if [ ! -d "$2" ]; then
		mkdir -p "$scratch/$1/upper" "$scratch/$1/work"
		mount -t overlay -o "lowerdir=$parent,upperdir=$scratch/$1/upper,workdir=$scratch/$1/work" kvmeter-lab "$parent"
		mkdir "$2"
		case $lab/ in "$parent"/*) mount --bind $scratch/lab "$lab" ;; esac
	fi
	mount --bind "$scratch/lab/$1" "$2"
}
private etc /etc/libvirt
private lib /var/lib/libvirt
private cache /var/cache/libvirt
private log /var/log/libvirt
private run /run/libvirt

# libvirt looks up its compiled-in user before it reads which one to use.
for file in passwd group; do
	cp /etc/$file $scratch/$file
	grep -q ^libvirt-qemu: $scratch/$file || case $file in
	passwd) echo libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin ;;
	group) echo libvirt-qemu:x:64055: ;;
	esac >>$scratch/$file
	mount --bind $scratch/$file /etc/$file
done

export DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent
unset NOTIFY_SOCKET LISTEN_FDS LISTEN_PID
if [ -z "$3" ]; then
	exec "$2" -f "$lab/libvirtd.conf" -p "$lab/libvirtd.pid"
fi
mount -t proc proc /proc
mount --bind "$scratch/lab/instances" "$3"
"$2" -f "$lab/libvirtd.conf" -p "$lab/libvirtd.pid" &
wait $!
