"""The names in Python's documentation that describe one operation in different words: known paraphrases."""

import re
from collections import defaultdict

# A family is a line, with indented lines that continue it: prefixes of names and, where siblings also share names by
# chance, a colon and a pattern for the names meant. Names of a family that are equal after their prefixes document one
# operation, of sibling types, in Python and in C, or as a function and as a method: their texts are paraphrases. A
# prefix may be a whole name. What a Python does not have is skipped.
FAMILIES = r"""
# Sequences of characters and of bytes, and the manual's chapters on built-in types.
str. bytes. bytearray. pydoc_data.topics.string-methods.str.
bytes.hex memoryview.hex
bytes.decode _codecs.decode
str.encode _codecs.encode
dict pydoc_data.topics.typesmapping.dict
list pydoc_data.topics.typesseq.list
range pydoc_data.topics.typesseq.range
tuple pydoc_data.topics.typesseq.tuple
slice. pydoc_data.topics.types.slice.
types.CodeType. pydoc_data.topics.types.codeobject.
# Containers.
list. _collections.deque. array.array. range. tuple. _collections_abc.Sequence. _collections_abc.MutableSequence.
    multiprocessing.shared_memory.ShareableList.
bytearray. list. _collections.deque. array.array. _collections_abc.MutableSequence. :
    append|clear|extend|insert|pop|remove|reverse
array.array. memoryview. : tobytes|tolist
dict. _collections.OrderedDict. collections.OrderedDict. collections.ChainMap. types.MappingProxyType.
    _collections_abc.Mapping. _collections_abc.MutableMapping.
_collections_abc.Mapping. _collections_abc.MutableMapping. _contextvars.Context. mailbox.Mailbox.
    email.message.Message. wsgiref.headers.Headers.
set. frozenset. _collections_abc.Set. _collections_abc.MutableSet.
# Numbers, functions of numbers, dates.
int. float. complex. fractions.Fraction. numbers.Complex. numbers.Rational. numbers.Integral. _decimal.Decimal.
    _pydecimal.Decimal.
_decimal.Decimal. _pydecimal.Decimal. _decimal.Context. _pydecimal.Context.
math. cmath.
math. _decimal.Decimal. _pydecimal.Context. : exp|fma|log10|sqrt
math.copysign _decimal.Decimal.copy_sign
math.isfinite _decimal.Decimal.is_finite
math.isinf _decimal.Decimal.is_infinite
math.isnan _decimal.Decimal.is_nan
math.nextafter _decimal.Decimal.next_toward
datetime.date. datetime.time. datetime.datetime. _datetime.date. _datetime.time. _datetime.datetime. _pydatetime.date.
    _pydatetime.time. _pydatetime.datetime.
datetime.tzinfo. datetime.time. _datetime.tzinfo. _datetime.timezone. _datetime.datetime. _pydatetime.tzinfo.
    _zoneinfo.ZoneInfo. zoneinfo._zoneinfo.ZoneInfo.
time. datetime.date. datetime.datetime. _datetime.date. _datetime.datetime. _pydatetime.datetime. :
    ctime|strftime|strptime
calendar.weekday _datetime.date.weekday
# One thing written twice: in Python and in C, or for two kinds of caller.
_pydecimal. _decimal.
datetime. _pydatetime. _datetime.
zoneinfo._zoneinfo. _zoneinfo.
heapq. _heapq.
functools. _functools.
_py_abc. _abc.
stat. _stat.
pickle._Pickler _pickle.Pickler
pickle._Unpickler _pickle.Unpickler
queue._Py _queue.
asyncio.tasks. asyncio.futures. asyncio.events. _asyncio.
hmac.HMAC _hashlib.HMAC
hashlib. _hashlib.
socket.socket. _socket.socket. ssl.SSLSocket.
socket. _socket. : (?!socket$).+
ssl. _ssl.
ssl.SSLSocket. ssl.SSLObject. _ssl._SSLSocket.
locale. _locale.
warnings. _warnings.
symtable. _symtable.
csv. _csv.
re. re.Pattern.
_struct. _struct.Struct.
timeit. timeit.Timer.
mimetypes. mimetypes.MimeTypes.
textwrap. textwrap.TextWrapper.
traceback. traceback.TracebackException. : format_exception_only|print_exc
code. code.InteractiveConsole. : interact
bdb. bdb.Bdb. : set_trace
logging. logging.Logger. logging.LoggerAdapter. logging.Manager.
logging.Logger. logging.Handler. : setLevel
pdb.Pdb.do_ pydoc_data.topics.debugger.
# Files, streams and their compression.
_pyio. _io.
_pyio.IOBase. _pyio.RawIOBase. _pyio.BufferedIOBase. _pyio.BufferedReader. _pyio.BufferedWriter. _pyio.FileIO.
    _pyio.BytesIO. _pyio.TextIOBase. _pyio.TextIOWrapper. _io._IOBase. _io._RawIOBase. _io._BufferedIOBase.
    _io.FileIO. _io.BytesIO. _io.StringIO. _io._TextIOBase. _io.TextIOWrapper. bz2.BZ2File. gzip.GzipFile.
    lzma.LZMAFile. zipfile.ZipExtFile. socket.SocketIO. tarfile._Stream. codecs.StreamReader. codecs.StreamWriter.
    http.client.HTTPResponse. mmap.mmap. _sqlite3.Blob. mailbox._PartialFile.
_pyio.RawIOBase. ssl.SSLSocket. ssl.SSLObject. _ssl.MemoryBIO. asyncio.streams.StreamReader. : read|readline|write
open _pyio.open codecs.open bz2.open gzip.open lzma.open tokenize.open
dbm.open dbm.dumb.open dbm.sqlite3.open shelve.open
bz2. gzip. lzma. zlib. : compress|decompress
_bz2.BZ2 _lzma.LZMA zlib. : (Compressor|Decompressor).*
_bz2.BZ2Compressor. _lzma.LZMACompressor. zlib.Compress.
_bz2.BZ2Decompressor. _lzma.LZMADecompressor. zlib._ZlibDecompressor. zlib.Decompress.
codecs.Codec. codecs.IncrementalEncoder. codecs.IncrementalDecoder. codecs.StreamWriter. codecs.StreamReader.
json. pickle. _pickle. marshal. plistlib. xmlrpc.client. : dump|dumps|load|loads
tarfile.TarFile. zipfile.ZipFile. : extract|extractall|close
tarfile.TarFile.getnames zipfile.ZipFile.namelist
tarfile.TarFile.getmembers zipfile.ZipFile.infolist
tarfile.TarFile.getmember zipfile.ZipFile.getinfo
tarfile.TarFile.list zipfile.ZipFile.printdir
tarfile.TarFile.extractfile zipfile.ZipFile.open
tarfile.TarFile.add zipfile.ZipFile.write
hmac.HMAC. _hashlib.HMAC. _hashlib.HASH. _blake2.blake2b. _md5.MD5Type. _sha1.SHA1Type. _sha3.sha3_224. :
    copy|digest|hexdigest|update
# Paths.
genericpath. posixpath. ntpath.
PATH. OS. OS.DirEntry. : chmod|is_dir|is_file|is_symlink|lstat|mkdir|readlink|rename|replace|rmdir|stat|unlink
PATH. importlib.resources.abc.Traversable. zipfile.Path. zipfile._path.Path.
PATH.samefile genericpath.samefile
PATH.exists genericpath.exists
PATH.joinpath posixpath.join
PATH.expanduser posixpath.expanduser
PATH.resolve posixpath.realpath
PATH.cwd OS.getcwd
PATH.iterdir OS.listdir
PATH.walk os.walk
PATH.glob glob.glob
PATH.symlink_to OS.symlink
PATH.hardlink_to OS.link
# Threads, processes, events and what they wait for.
threading. asyncio.locks.
asyncio.locks.Lock. threading._RLock. _thread.lock. _thread.LockType. _thread.RLock. importlib._bootstrap._ModuleLock.
threading.Thread. multiprocessing.process.BaseProcess.
multiprocessing.process.BaseProcess. subprocess.Popen. asyncio.subprocess.Process.
    asyncio.transports.SubprocessTransport. : kill|poll|send_signal|terminate|wait|communicate
queue. asyncio.queues.
queue.Queue. queue._PySimpleQueue. _queue.SimpleQueue.
asyncio.futures.Future asyncio.tasks.Task _asyncio.Future _asyncio.Task concurrent.futures._base.Future
concurrent.futures._base. asyncio.tasks. : as_completed|wait
concurrent.futures._base.Executor. concurrent.futures.process.ProcessPoolExecutor. multiprocessing.pool.Pool. : map
asyncio.tasks.sleep time.sleep
asyncio.base_events.BaseEventLoop. asyncio.events.AbstractEventLoop.
asyncio.events. asyncio.events.AbstractEventLoopPolicy. asyncio.events.BaseDefaultEventLoopPolicy.
    asyncio.unix_events._UnixDefaultEventLoopPolicy. : \w+_(event_loop|child_watcher)
asyncio.transports.BaseTransport. asyncio.transports.ReadTransport. asyncio.transports.WriteTransport.
    asyncio.sslproto._SSLProtocolTransport.
asyncio.protocols.BaseProtocol. asyncio.protocols.Protocol. asyncio.sslproto.SSLProtocol.
asyncio.coroutines. inspect. : iscoroutine|iscoroutinefunction
sys. threading. : (get|set)(trace|profile)
selectors.BaseSelector. select.epoll.
_collections_abc.Generator. _collections_abc.Coroutine. types.GeneratorType. types.CoroutineType. : close|send|throw
_collections_abc.AsyncGenerator. types.AsyncGeneratorType. : aclose|asend|athrow
inspect.currentframe logging.currentframe sys._getframe
# Protocols of the net, mail and markup.
ftplib.FTP. imaplib.IMAP4. nntplib.NNTP. poplib.POP3. smtplib.SMTP. telnetlib.Telnet. :
    connect|getline|getwelcome|login|noop|putline|quit|set_debuglevel|starttls
mailbox.Mailbox. mailbox.Maildir. mailbox.MH. mailbox.Babyl. mailbox._singlefileMailbox. mailbox._mboxMMDF.
    mailbox.mbox. mailbox.MMDF.
mailbox.Maildir. mailbox.MaildirMessage. mailbox._mboxMMDFMessage. : \w+_flags?
email.message.Message. wsgiref.headers.Headers.
email.message.Message. email.message.MIMEPart. : as_string|as_bytes|is_attachment
email.parser.Parser. email.parser.BytesParser.
html. xml.sax.saxutils. : escape|unescape
xml.etree.ElementTree.Element. xml.etree.ElementTree.ElementTree. : find|findall|findtext|iter|iterfind
xml.sax._exceptions.SAXParseException. xml.sax.xmlreader.Locator. xml.sax.xmlreader.InputSource. :
    get(Column|Line)Number|get(Public|System)Id
xml.dom.expatbuilder.ExpatBuilder. xml.dom.expatbuilder.FragmentBuilder. : parseFile|parseString
ipaddress._BaseNetwork. ipaddress.IPv4Address. ipaddress.IPv6Address. ipaddress.IPv4Network. ipaddress.IPv6Network. :
    is_.*|hosts
importlib.abc.InspectLoader. importlib.abc.ExecutionLoader. importlib.abc.ResourceLoader. importlib.abc.SourceLoader.
    importlib._bootstrap_external.SourceLoader. importlib._bootstrap_external.FileLoader. zipimport.zipimporter. :
    path_\w+|set_data|source_to_code|get_data|get_filename
importlib.abc.InspectLoader. zipimport.zipimporter. : get_code|get_source|is_package
importlib._bootstrap_external.PathFinder. importlib._bootstrap_external.FileFinder. zipimport.zipimporter. : find_spec
importlib.resources._legacy. importlib.resources.abc.ResourceReader. importlib.resources._functional.
calendar.TextCalendar. calendar.HTMLCalendar.
pydoc.HTMLDoc. pydoc.TextDoc.
# Widgets.
tkinter. tkinter.ttk.
tkinter.Entry. tkinter.Listbox. tkinter.Spinbox. tkinter.Text. tkinter.ttk.Entry. :
    bbox|delete|icursor|index|insert|nearest|see|select\w*
tkinter.Canvas. tkinter.Entry. tkinter.Listbox. tkinter.Spinbox. tkinter.Text. : scan_\w+
tkinter.Canvas. tkinter.Listbox. : item\w+
tkinter.Canvas. tkinter.Text. tkinter.ttk.Treeview. : tag_(un)?bind|tag_lower|tag_raise
tkinter.Scale. tkinter.Scrollbar. tkinter.Spinbox. tkinter.PanedWindow. tkinter.ttk.Widget. tkinter.ttk.Entry.
    tkinter.ttk.Notebook. : identify
tkinter.BooleanVar. tkinter.DoubleVar. tkinter.IntVar. tkinter.StringVar. tkinter.Variable. : get|set
tkinter.Grid.grid_ tkinter.Pack.pack_ tkinter.Place.place_
tkinter.Misc.grid_ tkinter.Misc.pack_ tkinter.Misc.place_
"""
# Prefixes that changed with the version of Python or differ with the platform.
VARIANTS = {
    "OS": ("posix", "nt"),
    "PATH": (
        "pathlib.Path",
        "pathlib.PurePath",
        "pathlib._local.Path",
        "pathlib._local.PurePath",
        "pathlib._abc.PathBase",
        "pathlib._abc.PurePathBase",
    ),
}


def families():
    """`(prefixes, pattern)` of each family, variants written out."""
    for line in re.sub(r"\n +", " ", FAMILIES).splitlines():
        if line and not line.startswith("#"):
            prefixes, _, pattern = line.partition(" : ")
            words = (word.partition(".") for word in prefixes.split())
            expanded = [f"{head}{dot}{rest}" for name, dot, rest in words for head in VARIANTS.get(name, (name,))]
            yield expanded, re.compile(pattern or ".*", re.DOTALL)


def paraphrase_groups(names):
    """Maps each name that has paraphrases among `names` to one of them, the same for the whole group.

    Names whose last part begins with an underscore are left out: their texts speak of the implementation.
    """
    names = [name for name in names if not name.rpartition(".")[2].startswith("_")]
    representative = {}

    def find(name):
        while representative.setdefault(name, name) != name:
            name = representative[name]
        return name

    for prefixes, pattern in families():
        siblings = defaultdict(set)
        for name in names:
            if name.startswith(tuple(prefixes)):
                operations = {name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)}
                for operation in filter(pattern.fullmatch, operations):
                    siblings[operation].add(name)
        for members in siblings.values():
            first, *others = sorted(members)
            for other in others:
                representative[find(other)] = find(first)
    return {name: find(name) for name in representative}
